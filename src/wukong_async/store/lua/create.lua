-- Create a job with its first records. Everything at once, or an early executor could find the job
-- without work for the others and take it for lost.
--
-- ARGV  1 msgpack: {id, channel, tasks, want, slots, lease, grace, attempts, unstarted, ttl, facts,
--                   {{literal, pointer}, ...}, {{executor, frontier}, ...}, taken, timeout,
--                   owner, result_ttl, manifest, versions}
--         timeout: how long the job may run; 0: no limit
--         result_ttl: how long its results are kept for others once its client is gone
-- reply OK | GONE: the upload mark is missing (the client gave up, or this is a late copy)
local a = cmsgpack.unpack(ARGV[1])
local id, channel, tasks, want, slots, lease, grace, attempts, unstarted, ttl, facts, values,
  records, taken, timeout, owner, result_ttl, manifest, versions = unpack(a, 1, 19)
if call('EXISTS', OPEN) == 0 then return 'GONE' end
if call('EXISTS', JOB) == 1 then return 'OK' end
local t = now()
call('HSET', JOB, 'id', id, 'channel', channel, 'state', 'running', 'error', '',
  'tasks', tasks, 'want', want, 'slots', slots, 'lease', lease, 'grace', grace,
  'attempts', attempts, 'unstarted', unstarted, 'ttl', ttl, 'deadline', t + ttl,
  'timeout', timeout, 'limit', timeout > 0 and t + timeout or 0,
  'result_ttl', result_ttl, 'manifest', manifest, 'versions', versions,
  'facts', facts, 'passed', 0, 'commits', 0, 'begins', 0)
for _, record in ipairs(records) do new_record(record[1], record[2], false, t + grace, '') end
call('SET', TAKEN, taken)
for _, value in ipairs(values) do call('HSET', VAL, value[1], value[2]) end
own(owner, t, lease, ttl)
expire(t + ttl, JOB, REC, LIVE, VAL, OPEN, TAKEN)
if tasks == 0 then finish_job('done', '') end
return 'OK'
