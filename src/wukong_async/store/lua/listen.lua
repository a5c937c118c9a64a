-- Have the end of a job announced on one more channel.
--
-- ARGV  1 channel
-- reply OK | GONE: there is no such job
local channels = call('HGET', JOB, 'channel')
if not channels then return 'GONE' end
if not string.find(channels, ARGV[1], 1, true) then
  call('HSET', JOB, 'channel', channels .. ' ' .. ARGV[1])
end
return 'OK'
