-- End the lease of a held record now, if the hold still owns it, without saying that nothing was done. Again: the same.
-- KEYS    the record
-- ARGV    the hold: token (8 bytes) and nonce (16 bytes); retention in ms; the attempts that were counted
-- returns 1 abandoned, 0 ownership was lost

local record = redis.call('GET', KEYS[1])
if not owned(record, ARGV[1]) or not (state_of(record) == RESERVED or state_of(record) == IN_PROGRESS) then
  return lost(KEYS[1], record)
end
local flags = string.byte(record, 1) - state_of(record) + IN_PROGRESS
local rest = string.sub(record, 2, 33) .. bytes4(tonumber(ARGV[3])) .. string.sub(record, 38, 41)
redis.call('SET', KEYS[1], string.char(flags) .. rest .. bytes8(server_time()), 'PX', ARGV[2])
return 1
