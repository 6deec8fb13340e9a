-- Claim records, each by itself: the rules are in store.py, and are followed here in their order.
-- KEYS    four per entry: the record; the token counter of its slot; the number of buckets of its slot; its bucket
-- ARGV    one per entry, packed because every argument costs the client as much as a step here:
--         1-16 nonce, 17-24 fingerprint, 25-28 redrive, 29-36 lease in us, 37-44 lease + retention in ms,
--         45 wishes: 1 to reserve + 8 if there is a fingerprint (as in a record's flags),
--         46-49 the number of buckets that the caller knows
-- returns one string per entry, without a list where there is one entry, packed likewise: a letter, then
--         C claimed, T taken over: token (8 bytes), attempt (4); B busy: us until the lease ends (8);
--         R completed: the result; N completed without a result; Q quarantined; X conflict: the state (1);
--         M nothing yet, the bucket is another one: the number of buckets (4)

local now = server_time()

-- The counter outlives the records. The clock lifts it, so that tokens grow even past a counter that was lost (a
-- failover, a flush); the counter carries it where the clock stands still or goes back.
local function next_token(counter, last)
  local token = math.max(tonumber(last or redis.call('GET', counter) or '0') + 1, math.min(now, 2 ^ 52))
  redis.call('SET', counter, string.format('%.0f', token))
  return token
end

local function claim(key, counter, layout, bucket, request)
  local record = redis.call('GET', key)
  local nonce, fingerprint, redrive = string.sub(request, 1, 16), string.sub(request, 17, 24), number4(request, 25)
  local tail = bytes8(now + number8(request, 29))
  local keep = string.format('%.0f', number8(request, 37))
  local wishes = string.byte(request, 45)
  local reserve, marked = wishes % 2 == 1, wishes >= HAS_FINGERPRINT
  local attempts, won, last = 0, 'C', nil
  if record then
    local state = state_of(record)
    local held = state == RESERVED or state == IN_PROGRESS
    attempts = number4(record, 34)
    if held and string.sub(record, 10, 25) == nonce then
      redis.call('SET', key, string.sub(record, 1, 41) .. tail, 'PX', keep)
      local again = has(record, TAKEN_OVER) and 'T' or 'C'
      return again .. string.sub(record, 2, 9) .. bytes4(attempts + (state == RESERVED and 1 or 0))
    end
    local comparable = marked and has(record, HAS_FINGERPRINT)
    if comparable and string.sub(record, 26, 33) ~= fingerprint and state ~= RELEASED then
      return 'X' .. string.char(state)
    end
    if state == COMPLETED then
      return has(record, HAS_RESULT) and 'R' .. string.sub(record, 42) or 'N'
    end
    if state == QUARANTINED then
      return 'Q'
    end
    if held then
      local left = number8(record, 42) - now
      if left > 0 then
        return 'B' .. bytes8(left)
      end
    end
    local redriven = number4(record, 38)
    if redrive > redriven then
      attempts = 0
    else
      redrive = redriven
    end
    -- A reservation that lapsed never started, but what it had taken over may have been done.
    if state == IN_PROGRESS or (held and has(record, TAKEN_OVER)) then
      won = 'T'
    end
  else
    local told = redis.call('MGET', counter, layout)
    local buckets = moved(key_of(key), told[2], number4(request, 46))
    if buckets then
      return 'M' .. bytes4(buckets)
    end
    local short = short_of(bucket, key_of(key), now)
    if short then
      local differs = marked and #short > 10 and string.sub(short, 11) ~= fingerprint
      return differs and 'X' .. string.char(COMPLETED) or 'N'
    end
    last = told[1]
  end
  local token = bytes8(next_token(counter, last))
  local attempt = attempts + 1
  if not reserve then
    attempts = attempt
  end
  local flags = (reserve and RESERVED or IN_PROGRESS) + (marked and HAS_FINGERPRINT or 0)
    + (won == 'T' and TAKEN_OVER or 0)
  local head = string.char(flags) .. token .. nonce .. fingerprint
  redis.call('SET', key, head .. bytes4(attempts) .. bytes4(redrive) .. tail, 'PX', keep)
  return won .. token .. bytes4(attempt)
end

if #ARGV == 1 then
  return claim(KEYS[1], KEYS[2], KEYS[3], KEYS[4], ARGV[1])
end
local outcomes = {}
for entry = 1, #ARGV do
  local at = entry * 4
  outcomes[entry] = claim(KEYS[at - 3], KEYS[at - 2], KEYS[at - 1], KEYS[at], ARGV[entry])
end
return outcomes
