-- Let the leases of held records end `lease` from now, each if the hold still owns it.
-- KEYS    one per entry: the record
-- ARGV    lease in us, lease + retention in ms, then one hold per entry: token (8 bytes) and nonce (16 bytes)
-- returns a string of one digit per entry: 1 renewed, 0 ownership was lost

local ends = bytes8(server_time() + tonumber(ARGV[1]))
local renewed = {}
for entry = 1, #KEYS do
  local record = redis.call('GET', KEYS[entry])
  if owned(record, ARGV[entry + 2]) and (state_of(record) == RESERVED or state_of(record) == IN_PROGRESS) then
    redis.call('SET', KEYS[entry], string.sub(record, 1, 41) .. ends, 'PX', ARGV[2])
    renewed[entry] = '1'
  else
    lost(KEYS[entry], record)
    renewed[entry] = '0'
  end
end
return table.concat(renewed)
