-- Take a record: the one moment at which an invocation becomes an executor. Atomic, so that of two
-- deliveries of one event only one gets the work.
--
-- ARGV  1 executor  2 nonce, fresh for each incarnation  3 request
-- reply {OK, gen, seq, told, lease, facts, frontier, marks, free, taken | nil} | {GONE} | {HELD}
--       free: slots that are not in use; taken only where it has to be checked
local x, nonce = ARGV[1], ARGV[2]
local job = call('HMGET', JOB, 'state', 'lease', 'attempts', 'facts', 'slots')
if job[1] ~= 'running' then return { 'GONE' } end
local r = load_record(x)
if not r then return { 'GONE' } end
if call('EXISTS', TAKEN) == 0 then
  finish_job('failed', cmsgpack.pack({ 'data', 'what is taken of its tasks' }))
  return { 'GONE' }
end
if r.nonce ~= nonce then
  if r.held and tonumber(call('ZSCORE', LIVE, x)) > now() then return { 'HELD' } end
  if r.tries >= tonumber(job[3]) then
    give_up('lost', x, r)
    return { 'GONE' }
  end
  r.nonce, r.held, r.gen, r.tries, r.unstarted = nonce, true, r.gen + 1, r.tries + 1, 0
  r.request, r.told = ARGV[3], digest(r.told, nonce)
  r.check = r.check or r.soft
  call('HSET', REC, x, pack_record(r))
  call('ZADD', LIVE, 'XX', lease_end(r, job[2]), x)
  call('HINCRBY', JOB, 'begins', 1)
end
return { 'OK', r.gen, r.seq, r.told, tonumber(job[2]), job[4], call('HGET', REC, x .. '/f'),
  call('HGET', REC, x .. '/m') or cmsgpack.pack({}), tonumber(job[5]) - call('ZCARD', LIVE),
  r.check and call('GET', TAKEN) }
