-- Shared by the scripts that give messages back. A ready message is kombu's JSON text. It is never decoded and
-- encoded here (cjson would change numbers and empty arrays): what must be added is put in front, or behind one
-- fixed piece of text that can only be a structural key of valid JSON.
local COUNT = '{"idempotent-bus-deliveries": '
local INFO = '"delivery_info": {"'

-- deliveries that ended without an ack, and the text without that count
local function split(text)
  if string.sub(text, 1, #COUNT) ~= COUNT then return 0, text end
  local _, stop, count = string.find(text, '^(%d+), ', #COUNT + 1)
  if not stop then return 0, text end
  return tonumber(count), '{' .. string.sub(text, stop + 1)
end

-- says "redelivered" as kombu does, for plain consumers too; left alone where the text has another shape
local function redelivered(text)
  local found, from = nil, 1
  while true do
    local start = string.find(text, INFO, from, true)
    if not start then break end
    found, from = start + #INFO - 1, start + 1
  end
  if not found or string.find(text, '"redelivered": true', found, true) == found then return text end
  return string.sub(text, 1, found - 1) .. '"redelivered": true, ' .. string.sub(text, found)
end

local function counted(text, count)
  if string.sub(text, 1, 2) ~= '{"' then return text end
  return COUNT .. count .. ', ' .. string.sub(text, 2)
end

local function clock()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end
