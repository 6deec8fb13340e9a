-- The entries of indexes of quarantined records, in their order; writes nothing.
-- KEYS    the indexes of slots, in the order of the slots
-- ARGV    where to begin, as ZRANGEBYLEX has it; how many at most
-- returns the entries

local found = {}
for number = 1, #KEYS do
  local left = tonumber(ARGV[2]) - #found
  if left <= 0 then
    break
  end
  for _, entry in ipairs(redis.call('ZRANGEBYLEX', KEYS[number], ARGV[1], '+', 'LIMIT', 0, left)) do
    found[#found + 1] = entry
  end
end
return found
