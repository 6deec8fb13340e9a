-- Gives an owner's messages back to the lists that they came from; those delivered too often go to the dead list.
-- KEYS    1 owners; 2 the owner's held; 3 dead; from 4: the lists
-- ARGV    1 owner; 2 which: 'lapsed' (all, if its lease lapsed), 'all', or 'some' (the numbers at the end)
--         3 how: 0 as they were, 1 marked redelivered, 2 marked and counted as a delivery
--         4 most deliveries (0: no bound); 5 'head' or 'tail'; 6 the queue's expiry, ms (0: none)
--         7 number of priorities; then their names; then the numbers
-- returns 1 how many went back; 2 how many went to the dead list
local now = clock()
local which, how, most = ARGV[2], ARGV[3], tonumber(ARGV[4])
local priorities = tonumber(ARGV[7])
if which == 'lapsed' then
  local deadline = redis.call('ZSCORE', KEYS[1], ARGV[1])
  if deadline and tonumber(deadline) > now then return { 0, 0 } end
end
local entries = {}
if which == 'some' then
  for i = 8 + priorities, #ARGV do
    local value = redis.call('HGET', KEYS[2], ARGV[i])
    if value then entries[#entries + 1] = { tonumber(ARGV[i]), value, ARGV[i] } end
  end
else
  local all = redis.call('HGETALL', KEYS[2])
  for i = 1, #all, 2 do entries[#entries + 1] = { tonumber(all[i]), all[i + 1], all[i] } end
end
-- At the head the oldest must end up as the next to be taken.
local head = ARGV[5] == 'head'
table.sort(entries, function(a, b)
  if head then return a[1] > b[1] end
  return a[1] < b[1]
end)
local back, buried = 0, 0
for _, entry in ipairs(entries) do
  local _, stop, priority = string.find(entry[2], '^(%S+) ')
  local original = string.sub(entry[2], stop + 1)
  local list, count, text = KEYS[4], split(original)
  for p = 1, priorities do
    if ARGV[7 + p] == priority then list = KEYS[3 + p] end
  end
  if how == '2' then count = count + 1 end
  if how == '2' and most > 0 and count >= most then
    redis.call('LPUSH', KEYS[3], now .. ' deliveries ' .. priority .. ' ' .. counted(text, count))
    buried = buried + 1
  else
    if how ~= '0' then text = redelivered(text) end
    if count > 0 then text = counted(text, count) end
    redis.call(head and 'RPUSH' or 'LPUSH', list, text)
    back = back + 1
  end
  redis.call('HDEL', KEYS[2], entry[3])
end
if which ~= 'some' then redis.call('ZREM', KEYS[1], ARGV[1]) end
if back > 0 and ARGV[6] ~= '0' then
  for i = 4, #KEYS do redis.call('PEXPIRE', KEYS[i], ARGV[6]) end
end
return { back, buried }
