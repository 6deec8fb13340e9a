-- Show the quarantined ones of records, and take the others out of the index: a record may be gone (deleted by hand).
-- KEYS    two per entry: the record, the index of its slot
-- ARGV    one per entry: its entry in the index
-- returns one per entry: the record as it lies there, or nothing

local shown = {}
for entry = 1, #ARGV do
  local record = redis.call('GET', KEYS[entry * 2 - 1])
  if record and state_of(record) == QUARANTINED then
    shown[entry] = record
  else
    redis.call('ZREM', KEYS[entry * 2], ARGV[entry])
    shown[entry] = false
  end
end
return shown
