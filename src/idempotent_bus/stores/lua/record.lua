-- How a record lies in Redis, and helpers over it. Put before every script of this folder.
--
-- One string per record, numbers big-endian, positions from 1 as Lua counts:
--   1      flags: state (1 reserved, 2 in progress, 3 completed, 4 released, 5 quarantined) + 8 if there is a
--          fingerprint + 16 if there is a result or a note + 32 if a held record was taken over; the two highest bits
--          are the format's version, 0
--   2-9    token       10-25  nonce (2-25 together are the hold that owners are compared by)
--   26-33  fingerprint, zeros if there is none
--   34-37  attempts    38-41  redrive
--   42-    held: when the lease ends, in microseconds, 8 bytes; completed: the result;
--          quarantined: the note; released: nothing
-- 41 bytes and no more while there is no result: up to 44 Redis keeps value and object in one allocation.
-- The key's own expiry is the retention; a quarantined record has none, and an entry in its slot's index.

local RESERVED, IN_PROGRESS, COMPLETED, RELEASED, QUARANTINED = 1, 2, 3, 4, 5
local HAS_FINGERPRINT, HAS_RESULT, TAKEN_OVER = 8, 16, 32

-- The server's time in microseconds: exact in a double until the year 2255.
local function server_time()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000000 + tonumber(time[2])
end

-- Redis has a library for numbers in bytes; a stand-in for tests may not have it.
local number4, number8, bytes4, bytes8
local library = rawget(_G, 'struct')
if library then
  local pack, unpack = library.pack, library.unpack
  function number4(text, at)
    return (unpack('>I4', text, at))
  end
  function number8(text, at)
    return (unpack('>I8', text, at))
  end
  function bytes4(value)
    return pack('>I4', value)
  end
  function bytes8(value)
    return pack('>I8', value)
  end
else
  function number4(text, at)
    local a, b, c, d = string.byte(text, at, at + 3)
    return ((a * 256 + b) * 256 + c) * 256 + d
  end
  function number8(text, at)
    return number4(text, at) * 4294967296 + number4(text, at + 4)
  end
  function bytes4(value)
    return string.char(
      math.floor(value / 16777216), math.floor(value / 65536) % 256, math.floor(value / 256) % 256, value % 256
    )
  end
  function bytes8(value)
    return bytes4(math.floor(value / 4294967296)) .. bytes4(value % 4294967296)
  end
end

local function state_of(record)
  return string.byte(record, 1) % 8
end

local function has(record, flag)
  return math.floor(string.byte(record, 1) / flag) % 2 == 1
end

local function owned(record, hold)
  return record and string.sub(record, 2, 25) == hold
end

-- 0: ownership was lost. Only a master may say so: after a fail-over the former one, as a replica that has not caught
-- up, does not know yet what is held at the new one. So a write is asked for, which changes nothing, but which a replica
-- refuses. record: what lies under the key.
local function lost(key, record)
  if record then
    redis.call('SET', key, '', 'NX')
  else
    redis.call('DEL', key)
  end
  return 0
end
