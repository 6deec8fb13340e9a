-- Claim records, each by itself: the rules are in store.py, and are followed here in their order.
-- KEYS    two per entry: the record, the token counter of its slot
-- ARGV    six per entry: nonce (16 bytes), fingerprint (8 bytes or ''), lease in us, lease + retention in ms,
--         redrive, 1 to reserve else 0
-- returns one string per entry (one is much faster to read than an array): a letter, then
--         C claimed, T taken over: token (8 bytes), attempt (4); B busy: us until the lease ends (8);
--         R completed: the result; N completed without a result; X conflict: the state (1)

local now = server_time()

-- The counter outlives the records. The clock lifts it, so that tokens grow even past a counter that was lost (a
-- failover, a flush); the counter carries it where the clock stands still or goes back.
local function next_token(counter)
  local last = tonumber(redis.call('GET', counter) or '0')
  local token = math.max(last + 1, math.min(now, 2 ^ 52))
  redis.call('SET', counter, string.format('%.0f', token))
  return token
end

local function claim(key, counter, nonce, fingerprint, lease, keep, redrive, reserve)
  local record = redis.call('GET', key)
  local attempts, won = 0, 'C'
  if record then
    local state = state_of(record)
    local held = state == RESERVED or state == IN_PROGRESS
    attempts = number4(record, 34)
    if held and string.sub(record, 10, 25) == nonce then
      redis.call('SET', key, string.sub(record, 1, 41) .. bytes8(now + lease), 'PX', keep)
      local again = has(record, TAKEN_OVER) and 'T' or 'C'
      return again .. string.sub(record, 2, 9) .. bytes4(attempts + (state == RESERVED and 1 or 0))
    end
    local comparable = fingerprint ~= '' and has(record, HAS_FINGERPRINT)
    if comparable and string.sub(record, 26, 33) ~= fingerprint and state ~= RELEASED then
      return 'X' .. string.char(state)
    end
    if state == COMPLETED then
      return has(record, HAS_RESULT) and 'R' .. string.sub(record, 42) or 'N'
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
    if state == IN_PROGRESS then
      won = 'T'
    end
  end
  local token = bytes8(next_token(counter))
  local attempt = attempts + 1
  if not reserve then
    attempts = attempt
  end
  local flags = (reserve and RESERVED or IN_PROGRESS) + (fingerprint ~= '' and HAS_FINGERPRINT or 0)
    + (won == 'T' and TAKEN_OVER or 0)
  local mark = fingerprint ~= '' and fingerprint or string.rep('\0', 8)
  record = string.char(flags) .. token .. nonce .. mark .. bytes4(attempts) .. bytes4(redrive)
  redis.call('SET', key, record .. bytes8(now + lease), 'PX', keep)
  return won .. token .. bytes4(attempt)
end

local outcomes = {}
for entry = 1, #KEYS / 2 do
  local at = (entry - 1) * 6
  outcomes[entry] = claim(
    KEYS[entry * 2 - 1], KEYS[entry * 2], ARGV[at + 1], ARGV[at + 2], tonumber(ARGV[at + 3]), ARGV[at + 4],
    tonumber(ARGV[at + 5]), ARGV[at + 6] == '1'
  )
end
return outcomes
