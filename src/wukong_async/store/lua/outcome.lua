-- How a job ended, in one look.
--
-- reply {state} while it runs | {state, error, tasks, passed, commits, begins, peak, memory,
--       {task, value, ...}} | {} for an unknown job
local job = call('HMGET', JOB, 'state', 'error', 'tasks', 'passed', 'commits', 'begins', 'peak',
  'memory')
if not job[1] then return {} end
if job[1] == 'running' then return { job[1] } end
local results = {}
if job[1] == 'done' then results = call('HGETALL', RES) end
return { job[1], job[2], tonumber(job[3]), tonumber(job[4]), tonumber(job[5]), tonumber(job[6]),
  tonumber(job[7]) or 0, tonumber(job[8]) or 0, results }
