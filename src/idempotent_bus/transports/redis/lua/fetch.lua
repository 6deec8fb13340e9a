-- Takes up to `want` messages and registers them as held in the same step. Registered before it is popped: an
-- error in between leaves a message in both places, never in none.
-- KEYS    for each queue: owners, held, then its lists, highest priority first
-- ARGV    1 want; 2 number of the first delivery; 3 owner; 4 lease, ms; 5 queues; 6 priorities; from 7: their names
-- returns groups: queue's place, priority's place, first number, messages...
-- A message that came back before is taken alone: if it kills its consumer, no neighbour is counted with it.
local want, number, owner, lease = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local queues, priorities = tonumber(ARGV[5]), tonumber(ARGV[6])
local out, taken = {}, 0
for p = 1, priorities do
  for q = 1, queues do
    local base = (q - 1) * (priorities + 2)
    local list = KEYS[base + 2 + p]
    if want == 0 then return out end
    -- Reading an empty list is also what makes the server tell this client of the next arrival (CLIENT TRACKING).
    local texts = redis.call('LRANGE', list, -want, -1)
    local group, fields = { q, p, number }, {}
    for i = #texts, 1, -1 do
      if want == 0 then break end
      local text = texts[i]
      if string.sub(text, 1, #COUNT) == COUNT then
        if taken > 0 then want = 0 break end
        want = 1
      end
      group[#group + 1] = text
      fields[#fields + 1] = number
      fields[#fields + 1] = ARGV[6 + p] .. ' ' .. text
      number, want, taken = number + 1, want - 1, taken + 1
    end
    if #fields > 0 then
      redis.call('ZADD', KEYS[base + 1], clock() + lease, owner)
      redis.call('HSET', KEYS[base + 2], unpack(fields))
      redis.call('LTRIM', list, 0, -1 - #fields / 2)
      out[#out + 1] = group
    end
  end
end
return out
