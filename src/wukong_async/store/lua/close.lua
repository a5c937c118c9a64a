-- Delete what a job has on a data shard. Atomic against `confirm`: what is written later finds no
-- `open` and takes itself back.
--
-- KEYS  1 open  2 index  3 job, which only the metadata shard has
-- ARGV  1 finish: nobody will ask for the job any more | retire: others may
--       2 time to live in ms of the objects that stay  3... those
-- reply OK | RUNNING: the job has not ended, nothing was done
if redis.call('HGET', KEYS[3], 'state') == 'running' then return 'RUNNING' end
-- A finisher may die before its last step: nobody may then take what is gone for lost.
if ARGV[1] == 'finish' then redis.call('HDEL', KEYS[3], 'manifest') end
redis.call('DEL', KEYS[1])
local stays = {}
for i = 3, #ARGV do stays[ARGV[i]] = true end
local objects = {}
for _, object in ipairs(redis.call('SMEMBERS', KEYS[2])) do
  if stays[object] then
    redis.call('PEXPIRE', object, ARGV[2])
  else
    objects[#objects + 1] = object
  end
end
for i = 1, #objects, 2000 do
  local some = { unpack(objects, i, math.min(i + 1999, #objects)) }
  redis.call('UNLINK', unpack(some))
  redis.call('SREM', KEYS[2], unpack(some))
end
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return 'OK'
