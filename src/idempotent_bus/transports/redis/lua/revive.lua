-- Moves messages that wait or are dead back to their lists, oldest first, however long they should still wait.
-- KEYS    1 delayed or dead; from 2: the lists
-- ARGV    1 'delayed' or 'dead'; 2 most to move; 3 the queue's expiry, ms (0: none); from 4: the priorities' names
-- returns how many were moved
local kind = ARGV[1]
local entries
if kind == 'delayed' then
  entries = redis.call('ZRANGE', KEYS[1], 0, tonumber(ARGV[2]) - 1)
else
  entries = redis.call('LRANGE', KEYS[1], -tonumber(ARGV[2]), -1)
end
for i = 1, #entries do
  -- A dead list is read from its right end, where the oldest is.
  local entry = kind == 'delayed' and entries[i] or entries[#entries + 1 - i]
  local pattern = kind == 'delayed' and '^%S+ (%S+) ' or '^%S+ %S+ (%S+) '
  local _, stop, priority = string.find(entry, pattern)
  local list = KEYS[2]
  for p = 4, #ARGV do
    if ARGV[p] == priority then list = KEYS[p - 2] end
  end
  local _, text = split(string.sub(entry, stop + 1))
  redis.call('LPUSH', list, text)
  if kind == 'delayed' then redis.call('ZREM', KEYS[1], entry) else redis.call('RPOP', KEYS[1]) end
end
if #entries > 0 and ARGV[3] ~= '0' then
  for i = 2, #KEYS do redis.call('PEXPIRE', KEYS[i], ARGV[3]) end
end
return #entries
