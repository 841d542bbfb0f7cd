-- ImaGen's side of a Supabase database. Run it with `imagen migrate`, with psql, or in the SQL editor, as `postgres`
-- (which is no superuser there); running it again changes nothing. Its notices say, part by part, what it did.
--
-- What an older release or the original system left is extended in place: nothing is dropped or renamed, and no more
-- is narrowed than the bucket, which becomes private, and what people may change in their rows: the tags.

begin;

set local client_min_messages = warning;  -- the report at the end says more than "already exists, skipping"
set local lock_timeout = '10s';           -- who waits for a lock on a table stops all who come after
set local statement_timeout = 0;          -- an index takes its time
do $alone$ begin perform pg_advisory_xact_lock(hashtext('imagen migrate')); end $alone$;

-- Everything this file cares for, and how it stands: compared at the end with how it stood before.
create or replace function pg_temp.imagen_state() returns table (part text, what text, how text) language sql as $state$
  with tables as (
    select c.*, n.nspname,
           case c.relname when 'jobs' then 'imagen_jobs_init' when 'imagen_usage' then 'imagen_usage_init'
                          else 'imagen_schema_init' end as part
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.relkind = 'r' and (n.nspname, c.relname) in
      (('imagen', 'images'), ('imagen', 'deletions'), ('imagen', 'jobs'), ('mai', 'imagen_usage'))
  )
  select case nspname when 'mai' then 'imagen_usage_init' else 'imagen_schema_grants' end, 'schema ' || nspname,
         nspacl::text from pg_namespace where nspname in ('imagen', 'mai')
  union all
  select part, format('table %s.%s', nspname, relname), (
           select string_agg(concat_ws(' ', attname, atttypid::regtype, attnotnull), ', ' order by attnum)
           from pg_attribute where attrelid = t.oid and attnum > 0 and not attisdropped)
         || coalesce((select string_agg(pg_get_constraintdef(oid), ', ' order by conname) from pg_constraint
                      where conrelid = t.oid), '') || relrowsecurity
  from tables t
  union all
  select case part when 'imagen_schema_init' then 'imagen_schema_grants' else part end,
         format('grants on %s.%s', nspname, relname),
         concat_ws(' ', relacl::text, (select string_agg(concat_ws(' ', attname, attacl::text), ' ' order by attnum)
                                       from pg_attribute where attrelid = t.oid and attacl is not null))
  from tables t
  union all
  select part, 'index ' || i.indexname, i.indexdef from pg_indexes i join tables t
      on (i.schemaname, i.tablename) = (t.nspname, t.relname)
  union all
  select coalesce(part, 'imagen_storage_policies'), 'policy ' || policyname,
         concat_ws(' ', permissive, cmd, roles::text, qual, with_check)
  from pg_policies p left join tables t on (p.schemaname, p.tablename) = (t.nspname, t.relname)
  where t.oid is not null or (schemaname = 'storage' and policyname like 'imagen\_%')
  union all
  select part, 'trigger ' || tgname, pg_get_triggerdef(g.oid) from pg_trigger g join tables t on t.oid = g.tgrelid
  where not tgisinternal
  union all
  select case when proname = 'owns_object' then 'imagen_storage_policies' when proname = 'my_usage' then 'imagen_usage_init'
              when proname like '%job%' then 'imagen_jobs_init' else 'imagen_schema_init' end,
         'function imagen.' || proname, concat_ws(' ', prosrc, prosecdef, proacl::text, proconfig::text)
  from pg_proc where pronamespace = to_regnamespace('imagen')
  union all
  select 'imagen_jobs_init', 'publication ' || pubname, 'imagen.jobs' from pg_publication_tables
  where pubname = 'supabase_realtime' and schemaname = 'imagen' and tablename = 'jobs'
  union all
  select 'imagen_storage_bucket', 'bucket ' || id, concat_ws(' ', public, file_size_limit, allowed_mime_types::text)
  from storage.buckets where id = 'imagen-generated'
  union all
  select 'imagen_pgrst_expose', 'exposed schemas',
         coalesce(string_agg(setting, '; ' order by setdatabase), 'left to the Dashboard')
  from pg_db_role_setting cross join unnest(setconfig) as setting
  where setrole = to_regrole('authenticator') and setting like 'pgrst.db\_schemas=%'
    and setdatabase in (0, (select oid from pg_database where datname = current_database()))
$state$;

create temporary table imagen_before on commit drop as select * from pg_temp.imagen_state();

-- What is there is left alone: even "create … if not exists" locks the table, and drop and create lock it against reads.
create or replace function pg_temp.imagen_make(wanted text, statement text) returns void language plpgsql as $make$
begin
  if not exists (select from imagen_before where what = wanted) then
    execute statement;
  end if;
end
$make$;

-- Whoever is deleted in auth.users takes their rows along.
create or replace function pg_temp.imagen_cascade(changed regclass) returns void language plpgsql as $cascade$
declare old record;
begin
  for old in select conname, pg_get_constraintdef(oid) as rule from pg_constraint
             where conrelid = changed and contype = 'f' and confrelid = 'auth.users'::regclass and confdeltype in ('a', 'r')
  loop
    execute format('alter table %s drop constraint %I, add constraint %2$I %s', changed, old.conname, regexp_replace(
      replace(old.rule, ' ON DELETE RESTRICT', ''), '(REFERENCES \S+\(\w+\))', '\1 ON DELETE CASCADE'));
  end loop;
end
$cascade$;

-- ---------------------------------------------------------------- imagen_schema_init

create schema if not exists imagen;

create table if not exists imagen.images (
  id                uuid primary key default gen_random_uuid(),
  owner_user_id     uuid not null references auth.users (id) on delete cascade,
  prompt            text not null,
  prompt_hash       text,           -- sha256 of the prompt in UTF-8, hex
  backend           text not null,
  model             text,
  seed              bigint,
  steps             int,
  width             int,
  height            int,
  latency_ms        int,
  cost_usd_estimate numeric(10, 6),
  storage_path      text not null,  -- inside the bucket
  sidecar           jsonb,
  tags              text[] default '{}',
  created_at        timestamptz default now(),
  made_at           timestamptz,    -- the sidecar's time, which a delivery may be far behind
  mime_type         text,
  bytes             bigint
);

-- The images whose rows were deleted: their objects are still to be deleted, which only Storage's API may do, by the
-- worker or by `imagen sync`; and none of them comes back for 30 days, by a delivery that was on its way.
create table if not exists imagen.deletions (
  image_id          uuid primary key,
  storage_path      text not null,
  deleted_at        timestamptz not null default now(),
  object_deleted_at timestamptz
);

do $images$
declare
  missing record;
  twice   int;
begin
  for missing in
    select * from (values
      ('prompt_hash', 'text'), ('model', 'text'), ('seed', 'bigint'), ('steps', 'int'), ('width', 'int'),
      ('height', 'int'), ('latency_ms', 'int'), ('cost_usd_estimate', 'numeric(10, 6)'), ('sidecar', 'jsonb'),
      ('tags', 'text[] default ''{}'''), ('created_at', 'timestamptz default now()'), ('made_at', 'timestamptz'),
      ('mime_type', 'text'), ('bytes', 'bigint')) as columns (name, type)
    where not exists (select from pg_attribute
                      where attrelid = 'imagen.images'::regclass and attname = name and not attisdropped)
  loop
    execute format('alter table imagen.images add column %I %s', missing.name, missing.type);
  end loop;

  perform pg_temp.imagen_make('index imagen_images_owner_created_idx',
    'create index imagen_images_owner_created_idx on imagen.images (owner_user_id, created_at desc)');
  perform pg_temp.imagen_make('index imagen_images_owner_made_idx',
    'create index imagen_images_owner_made_idx on imagen.images (owner_user_id, made_at desc)');
  perform pg_temp.imagen_make('index imagen_deletions_open_idx',
    'create index imagen_deletions_open_idx on imagen.deletions (deleted_at) where object_deleted_at is null');
  perform pg_temp.imagen_make('index imagen_images_backend_idx',
    'create index imagen_images_backend_idx on imagen.images (backend)');
  perform pg_temp.imagen_make('index imagen_images_tags_idx',
    'create index imagen_images_tags_idx on imagen.images using gin (tags)');

  -- Without it a signed-in user could insert a row that names another's object, and read that.
  if to_regclass('imagen.imagen_images_storage_path_key') is null then
    select count(*) into twice from (
      select from imagen.images group by storage_path having count(*) > 1) as repeated;
    if twice > 0 then
      raise warning 'by hand: % values of imagen.images.storage_path stand in several rows, so it is not unique yet; '
                    'mend them, then run this again', twice;
    else
      create unique index imagen_images_storage_path_key on imagen.images (storage_path);
    end if;
  end if;

  if not (select relrowsecurity from pg_class where oid = 'imagen.images'::regclass) then
    alter table imagen.images enable row level security;
  end if;
  if not (select relrowsecurity from pg_class where oid = 'imagen.deletions'::regclass) then
    alter table imagen.deletions enable row level security;
  end if;
  perform pg_temp.imagen_cascade('imagen.images');
end
$images$;

-- What anybody may have written as a time; null where it is none.
create or replace function imagen.moment(text) returns timestamptz
  language plpgsql stable strict set search_path = '' as $moment$
begin
  return $1::timestamptz;
exception when others then
  return null;
end
$moment$;

create or replace function imagen.images_insert() returns trigger
  language plpgsql security definer set search_path = '' as $insert$
begin
  if exists (select from imagen.deletions where image_id = new.id and deleted_at > now() - interval '30 days') then
    raise check_violation using message = 'this image was deleted';  -- which nobody tries a second time
  end if;
  -- Whoever writes the row, an older release too, has these in the sidecar.
  new.made_at := coalesce(new.made_at, imagen.moment(new.sidecar ->> 'timestamp'), new.created_at, now());
  new.mime_type := coalesce(new.mime_type, new.sidecar ->> 'mime_type');
  if new.bytes is null and new.sidecar ->> 'bytes' ~ '^\d{1,15}$' then
    new.bytes := new.sidecar ->> 'bytes';
  end if;
  if coalesce(new.tags, '{}') = '{}' and jsonb_typeof(new.sidecar -> 'tags') = 'array' then
    new.tags := array(select jsonb_array_elements_text(new.sidecar -> 'tags'));
  end if;
  return new;
end
$insert$;

-- However a row goes: by imagen.delete_image, with its owner, or by hand.
create or replace function imagen.images_delete() returns trigger
  language plpgsql security definer set search_path = '' as $delete$
begin
  delete from imagen.deletions where object_deleted_at is not null and deleted_at < now() - interval '30 days';
  insert into imagen.deletions (image_id, storage_path) select id, storage_path from deleted
  on conflict (image_id) do update
    set storage_path = excluded.storage_path, deleted_at = now(), object_deleted_at = null;
  return null;
end
$delete$;

-- An object that another row names is not among them.
create or replace function imagen.objects_to_delete() returns table (image_id uuid, storage_path text)
  language sql stable set search_path = '' as $objects$
  select d.image_id, d.storage_path from imagen.deletions d
  where d.object_deleted_at is null and d.storage_path <> ''
    and not exists (select from imagen.images i where i.storage_path = d.storage_path)
  order by d.deleted_at limit 100
$objects$;

-- Whether there was such an image of the caller's. Who comes without a token has a login to the database.
create or replace function imagen.delete_image(image uuid) returns boolean
  language plpgsql security definer set search_path = '' as $image$
begin
  delete from imagen.images
   where id = image
     and (owner_user_id = (select auth.uid()) or coalesce((select auth.role()), 'service_role') = 'service_role');
  return found;
end
$image$;

do $triggers$
begin
  perform pg_temp.imagen_make('trigger imagen_images_insert', '
    create trigger imagen_images_insert before insert on imagen.images
      for each row execute function imagen.images_insert()');
  perform pg_temp.imagen_make('trigger imagen_images_delete', '
    create trigger imagen_images_delete after delete on imagen.images
      referencing old table as deleted for each statement execute function imagen.images_delete()');
  if not exists (select from imagen_before where what = 'table imagen.images' and how like '%made_at%') then
    update imagen.images
       set made_at = coalesce(imagen.moment(sidecar ->> 'timestamp'), created_at),
           mime_type = sidecar ->> 'mime_type',
           bytes = case when sidecar ->> 'bytes' ~ '^\d{1,15}$' then (sidecar ->> 'bytes')::bigint end;
  end if;
end
$triggers$;
revoke execute on function imagen.images_insert(), imagen.images_delete(), imagen.objects_to_delete(),
  imagen.delete_image(uuid), imagen.moment(text) from public, anon;
grant execute on function imagen.delete_image(uuid) to authenticated, service_role;
grant execute on function imagen.objects_to_delete() to service_role;

-- Nor may a row name what somebody else uploaded and has no row yet, or no longer.
create or replace function imagen.may_name(path text) returns boolean
  language sql stable security definer set search_path = '' as $may$
  select not exists (select from storage.objects o where o.bucket_id = 'imagen-generated' and o.name = path
                     and o.owner_id is distinct from (select auth.uid())::text)
$may$;
revoke execute on function imagen.may_name(text) from public;
grant execute on function imagen.may_name(text) to authenticated;

-- (select auth.uid()) is asked once a query, auth.uid() once a row.
do $policies$
begin
  perform pg_temp.imagen_make('policy imagen_images_owner_select', '
    create policy imagen_images_owner_select on imagen.images for select to authenticated
      using (owner_user_id = (select auth.uid()))');
  perform pg_temp.imagen_make('policy imagen_images_owner_insert', '
    create policy imagen_images_owner_insert on imagen.images for insert to authenticated
      with check (owner_user_id = (select auth.uid()))');
  perform pg_temp.imagen_make('policy imagen_images_insert_path', '
    create policy imagen_images_insert_path on imagen.images as restrictive for insert to authenticated
      with check (imagen.may_name(storage_path))');
  -- Nor what is not there yet: only where nobody but the caller can put something.
  perform pg_temp.imagen_make('policy imagen_images_insert_folder', '
    create policy imagen_images_insert_folder on imagen.images as restrictive for insert to authenticated
      with check (starts_with(storage_path, (select auth.uid())::text || ''/''))');
  perform pg_temp.imagen_make('policy imagen_images_owner_update', '
    create policy imagen_images_owner_update on imagen.images for update to authenticated
      using (owner_user_id = (select auth.uid())) with check (owner_user_id = (select auth.uid()))');
end
$policies$;

-- ---------------------------------------------------------------- imagen_schema_grants

grant usage on schema imagen to anon, authenticated, service_role;
grant all on all tables in schema imagen to service_role;
grant all on all sequences in schema imagen to service_role;
alter default privileges in schema imagen grant all on tables to service_role;
alter default privileges in schema imagen grant all on sequences to service_role;
grant select, insert on imagen.images to authenticated;
revoke update on imagen.images from authenticated;  -- of a row that exists the owner changes the tags alone
grant update (tags) on imagen.images to authenticated;

-- ---------------------------------------------------------------- imagen_storage_bucket

insert into storage.buckets as known (id, name, public, file_size_limit, allowed_mime_types)
values ('imagen-generated', 'imagen-generated', false, 52428800, '{image/png,image/jpeg,image/webp}')
on conflict (id) do update
  set public = false,
      file_size_limit = coalesce(known.file_size_limit, excluded.file_size_limit),
      allowed_mime_types = array(select distinct unnest(known.allowed_mime_types || excluded.allowed_mime_types))
  where known.public or known.file_size_limit is null or known.allowed_mime_types is null
     or not known.allowed_mime_types @> excluded.allowed_mime_types;

-- ---------------------------------------------------------------- imagen_storage_policies

-- A subquery in the policy would run as the caller: whoever may not read imagen.images could then read no object of any
-- bucket. This function runs as its owner and tells callers of their own objects only, so everybody may call it.
create or replace function imagen.owns_object(path text) returns boolean
  language sql stable security definer set search_path = '' as $owns$
  select exists (select from imagen.images i where i.storage_path = path and i.owner_user_id = (select auth.uid()))
$owns$;

grant execute on function imagen.owns_object(text) to authenticated;  -- also where new functions are for nobody

do $policies$
begin
  perform pg_temp.imagen_make('policy imagen_objects_owner_select', '
    create policy imagen_objects_owner_select on storage.objects for select to authenticated
      using (bucket_id = ''imagen-generated'' and imagen.owns_object(name))');
  perform pg_temp.imagen_make('policy imagen_objects_insert', '
    create policy imagen_objects_insert on storage.objects for insert to authenticated
      with check (bucket_id = ''imagen-generated'')');
  -- Whatever other policies there are: nobody but the service puts anything where another's image is, or will be.
  perform pg_temp.imagen_make('policy imagen_objects_insert_folder', '
    create policy imagen_objects_insert_folder on storage.objects as restrictive for insert to public
      with check (bucket_id <> ''imagen-generated'' or starts_with(name, (select auth.uid())::text || ''/''))');
  perform pg_temp.imagen_make('policy imagen_objects_move_folder', '
    create policy imagen_objects_move_folder on storage.objects as restrictive for update to public
      with check (bucket_id <> ''imagen-generated'' or starts_with(name, (select auth.uid())::text || ''/''))');
  perform pg_temp.imagen_make('policy imagen_objects_folder_select', '
    create policy imagen_objects_folder_select on storage.objects for select to authenticated
      using (bucket_id = ''imagen-generated'' and starts_with(name, (select auth.uid())::text || ''/''))');
  perform pg_temp.imagen_make('policy imagen_objects_folder_delete', '
    create policy imagen_objects_folder_delete on storage.objects for delete to authenticated
      using (bucket_id = ''imagen-generated'' and starts_with(name, (select auth.uid())::text || ''/''))');
end
$policies$;

-- ---------------------------------------------------------------- imagen_pgrst_expose

-- An in-database list of exposed schemas overrules the Dashboard's for good, so one that exists is extended, and none
-- is made unless asked for: `imagen migrate --expose`, or `set imagen.expose = 'on'` before this file.
do $expose$
declare
  per_database boolean;
  known        text;
  wanted       text;
begin
  select s.setdatabase <> 0, regexp_replace(setting, '^[^=]*=', '') into per_database, known
  from pg_db_role_setting s cross join unnest(s.setconfig) as setting
  where s.setrole = to_regrole('authenticator') and setting like 'pgrst.db\_schemas=%'
    and s.setdatabase in (0, (select oid from pg_database where datname = current_database()))
  order by s.setdatabase desc  -- the value for this database wins
  limit 1;
  wanted := coalesce(known, 'public, graphql_public');
  if not 'imagen' = any (regexp_split_to_array(wanted, '\s*,\s*')) then
    wanted := wanted || ', imagen';
  end if;
  if not 'mai' = any (regexp_split_to_array(wanted, '\s*,\s*')) then
    wanted := wanted || ', mai';
  end if;
  if known is null and coalesce(current_setting('imagen.expose', true), '') <> 'on' then
    raise warning 'by hand: add the schemas imagen and mai under Data API, Exposed schemas, in the Dashboard; '
                  'or run `imagen migrate --expose`, after which the Dashboard''s own list counts no more';
  elsif wanted is distinct from known then
    execute format('alter role authenticator %s set pgrst.db_schemas = %L',
                   case when per_database then format('in database %I', current_database()) else '' end, wanted);
  end if;
exception when insufficient_privilege or undefined_object then
  raise warning 'by hand: as a superuser, alter role authenticator set pgrst.db_schemas = %; notify pgrst (%)',
                quote_literal(wanted), sqlerrm;
end
$expose$;
notify pgrst, 'reload config';
notify pgrst, 'reload schema';

-- ---------------------------------------------------------------- imagen_usage_init

-- One row for each paid call; the prompt itself never. A table that is already there is left as it is.
do $usage$
declare
  moment name;
  grants text := 'grant usage on schema mai to service_role; '
                 'grant select, insert, update on mai.imagen_usage to service_role';
begin
  if to_regclass('mai.imagen_usage') is null then
    create schema if not exists mai;
    create table mai.imagen_usage (
      id                uuid primary key default gen_random_uuid(),
      created_at        timestamptz not null default now(),
      owner_user_id     uuid,
      image_id          uuid,
      backend           text,
      model             text,
      prompt_hash       text,
      width             int,
      height            int,
      steps             int,
      latency_ms        int,
      cost_usd_estimate numeric(10, 6),
      charged           text,           -- yes, or unknown
      host              text
    );
    create index imagen_usage_created_idx on mai.imagen_usage (created_at);
    create index imagen_usage_owner_idx on mai.imagen_usage (owner_user_id, created_at);
    alter table mai.imagen_usage enable row level security;
    revoke all on mai.imagen_usage from public, anon, authenticated;
    grant usage on schema mai to service_role;
    grant all on mai.imagen_usage to service_role;
  end if;
  select max(attname) into moment from pg_attribute
  where attrelid = 'mai.imagen_usage'::regclass and attname in ('created_at', 'at') and atttypid = 'timestamptz'::regtype;
  if not (has_schema_privilege('service_role', 'mai', 'usage')
          and has_table_privilege('service_role', 'mai.imagen_usage', 'select')
          and has_table_privilege('service_role', 'mai.imagen_usage', 'insert')
          and has_table_privilege('service_role', 'mai.imagen_usage', 'update')) then
    perform set_config('imagen.usage_lacks', grants, true);  -- for the report
    raise warning 'by hand: %; without it no usage is recorded', grants;
  end if;
  -- What the caller's own images have cost. A table of somebody else's may have other columns.
  if moment is null or not exists (
      select from pg_attribute where attrelid = 'mai.imagen_usage'::regclass and attname = 'owner_user_id'
        and atttypid = 'uuid'::regtype and not attisdropped) then
    raise warning 'by hand: mai.imagen_usage has no owner_user_id or no time, so there is no imagen.my_usage';
  else
    execute format($function$
      create or replace function imagen.my_usage(since timestamptz default now() - interval '30 days')
        returns table (at timestamptz, image_id text, backend text, model text, cost_usd numeric, charged text)
        language sql stable security definer set search_path = '' as $my$
        select u.%1$I, j ->> 'image_id', j ->> 'backend', j ->> 'model',
               coalesce(j ->> 'cost_usd_estimate', j ->> 'cost_usd')::numeric, j ->> 'charged'
        from mai.imagen_usage u, to_jsonb(u) j
        where u.owner_user_id = (select auth.uid()) and u.%1$I >= since order by u.%1$I desc
      $my$$function$, moment);
    revoke execute on function imagen.my_usage(timestamptz) from public, anon;
    grant execute on function imagen.my_usage(timestamptz) to authenticated;
  end if;
end
$usage$;

-- ---------------------------------------------------------------- imagen_jobs_init

create table if not exists imagen.jobs (
  id               uuid primary key default gen_random_uuid(),
  owner_user_id    uuid not null default auth.uid() references auth.users (id) on delete cascade,
  prompt           text not null,
  backend          text,            -- null: the worker's default
  style            text,
  width            int,
  height           int,
  steps            int,
  seed             bigint,          -- null: derived from the id
  status           text not null default 'pending',
  image_id         uuid references imagen.images (id) on delete set null,
  error            text,
  created_at       timestamptz default now(),
  started_at       timestamptz,
  finished_at      timestamptz
) with (fillfactor = 70);           -- heartbeats are updates in place
alter table imagen.jobs
  add column if not exists seq              bigint generated always as identity,
  add column if not exists negative_prompt  text,
  add column if not exists backend_opts     jsonb,
  add column if not exists priority         int not null default 0,
  add column if not exists attempt          int not null default 0,
  add column if not exists max_attempts     int not null default 3,
  add column if not exists run_after        timestamptz not null default now(),
  add column if not exists claimed_by       uuid,      -- the process, not the host
  add column if not exists claimed_slot     text,
  add column if not exists lease_until      timestamptz,
  add column if not exists cancel_requested boolean not null default false,
  add column if not exists progress         real,      -- 0 … 1
  add column if not exists note             text,
  add column if not exists receipt          jsonb,     -- written before a paid call leaves
  add column if not exists error_code       text,
  add column if not exists inputs           text[],    -- paths in the bucket that the owner may read
  add column if not exists mask             text,      -- likewise
  add column if not exists strength         real,
  add column if not exists aspect           text,      -- such as 16:9, where there is no size
  add column if not exists format           text,      -- png, jpeg, webp
  add column if not exists background       text,      -- auto, opaque, transparent
  add column if not exists quality          text,      -- as the backend calls it
  add column if not exists lost             int not null default 0,  -- attempts whose worker was lost
  add column if not exists handed_back_at   timestamptz,  -- first, by a worker that could not make it
  add column if not exists key              text;      -- the same one, the same job
alter table imagen.jobs alter column owner_user_id set default auth.uid();

do $jobs$
declare
  old record;
  wanted record;
  deep text;
begin
  -- What the original system made narrower is made anew.
  for old in select conname from pg_constraint where conrelid = 'imagen.jobs'::regclass and (
      (contype = 'f' and confrelid = 'imagen.images'::regclass and confdeltype <> 'n')
      or (contype = 'c' and pg_get_constraintdef(oid) ~ '''running''' and pg_get_constraintdef(oid) !~ '''canceled'''))
  loop
    execute format('alter table imagen.jobs drop constraint %I', old.conname);
  end loop;
  for wanted in select * from (values
      ('imagen_jobs_image_fkey', 'foreign key (image_id) references imagen.images (id) on delete set null'),
      ('imagen_jobs_status_check', 'check (status in (''pending'', ''running'', ''done'', ''failed'', ''canceled''))'),
      ('imagen_jobs_prompt_check', 'check (char_length(prompt) between 1 and 32000)'),
      ('imagen_jobs_negative_check', 'check (char_length(negative_prompt) <= 32000)'),
      ('imagen_jobs_size_check', 'check (width between 16 and 8192 and height between 16 and 8192)'),
      ('imagen_jobs_steps_check', 'check (steps between 0 and 500)'),
      ('imagen_jobs_seed_check', 'check (seed >= 0)'),
      ('imagen_jobs_names_check', 'check (char_length(backend) <= 200 and char_length(style) <= 200)'),
      ('imagen_jobs_opts_check', 'check (jsonb_typeof(backend_opts) = ''object'' and octet_length(backend_opts::text) <= 16384)'),
      ('imagen_jobs_key_check', 'check (char_length(key) between 1 and 200)'),
      ('imagen_jobs_inputs_check', 'check (cardinality(inputs) <= 16 and octet_length(array_to_string(inputs, '''')) <= 16384'
        ' and char_length(mask) <= 1024 and strength between 0 and 1)'),
      ('imagen_jobs_looks_check', 'check (char_length(concat(aspect, format, background, quality)) <= 200)')
    ) as v (name, rule)
  loop
    if not exists (select from pg_constraint where conrelid = 'imagen.jobs'::regclass and (conname = wanted.name
        or (wanted.name = 'imagen_jobs_image_fkey' and contype = 'f' and confrelid = 'imagen.images'::regclass))) then
      begin
        execute format('alter table imagen.jobs add constraint %I %s', wanted.name, wanted.rule);
      exception when check_violation or foreign_key_violation then
        raise warning 'by hand: rows of imagen.jobs break %, so it is not there yet', wanted.name;
      end;
    end if;
  end loop;
  -- What a worker reads of a job: 16 levels, and numbers that JSON's readers know. A row that was there before may be
  -- so: its own attempt will fail. (Without the exception, or with NOT VALID, nobody could even mark it as failed.)
  if not exists (select from imagen_before where what = 'table imagen.jobs' and how like '%strict $.**{17}%') then
    deep := 'not backend_opts @? ''strict $.**{17}'' and not backend_opts @? '
            '''strict $.** ? (@.type() == "number" && (@ > 1e300 || @ < -1e300))''';
    begin
      execute format('alter table imagen.jobs add constraint imagen_jobs_depth_check check (%s)', deep);
    exception when check_violation then
      execute format('alter table imagen.jobs add constraint imagen_jobs_depth_check check (seq <= %s or (%s))',
                     (select max(seq) from imagen.jobs), deep);
    end;
  end if;
end
$jobs$;

create index if not exists imagen_jobs_ready_idx on imagen.jobs (priority desc, seq) where status = 'pending';
-- A claim reads these at one place for each owner and priority; the second for a worker of some backends alone.
create index if not exists imagen_jobs_turn_idx
  on imagen.jobs (owner_user_id, priority, run_after, seq) where status = 'pending';
create index if not exists imagen_jobs_backend_turn_idx
  on imagen.jobs (coalesce(backend, ''), owner_user_id, priority, run_after, seq) where status = 'pending';
create index if not exists imagen_jobs_served_idx
  on imagen.jobs (owner_user_id, started_at) where started_at is not null;
create index if not exists imagen_jobs_handed_back_idx
  on imagen.jobs (handed_back_at) where status = 'pending' and handed_back_at is not null;
create index if not exists imagen_jobs_running_idx on imagen.jobs (id) where status = 'running';
-- One key, one outcome: only a job that has failed, or was canceled, at no cost, leaves its key to another.
create unique index if not exists imagen_jobs_key_idx on imagen.jobs (owner_user_id, key)
  where key is not null and (status in ('pending', 'running', 'done') or receipt is not null);
create index if not exists imagen_jobs_owner_idx on imagen.jobs (owner_user_id, created_at desc);

-- Empty and once a statement: a thousand rows in one insert are one notification.
create or replace function imagen.jobs_notify() returns trigger language plpgsql set search_path = '' as $notify$
begin
  perform pg_notify('imagen_jobs', '');
  return null;
end
$notify$;
create or replace trigger imagen_jobs_notify after insert on imagen.jobs
  for each statement execute function imagen.jobs_notify();

-- Whoever adds a job a second time, and got no answer the first time, is told which it is: in `details`. As the caller,
-- who sees no jobs but their own.
create or replace function imagen.jobs_key() returns trigger language plpgsql set search_path = '' as $key$
declare earlier uuid;
begin
  select id into earlier from imagen.jobs
   where owner_user_id = new.owner_user_id and key = new.key
     and (status in ('pending', 'running', 'done') or receipt is not null);
  if found then
    raise unique_violation using message = 'there is a job with this key', detail = earlier;
  end if;
  return new;
end
$key$;
create or replace trigger imagen_jobs_key before insert on imagen.jobs
  for each row when (new.key is not null and current_user = 'authenticated') execute function imagen.jobs_key();

-- limits.per_owner.pending of imagen.yaml: `imagen migrate` writes it into the trigger. Without imagen.max_pending (in
-- psql, say) what is there stays.
create or replace function imagen.jobs_pending() returns trigger
  language plpgsql security definer set search_path = '' as $pending$
declare
  whose   uuid;
  waiting int;
  most    int := tg_argv[0];
begin
  for whose in select distinct owner_user_id from inserted where status = 'pending' order by 1 loop
    -- Two inserts of one owner count each other's rows.
    perform pg_advisory_xact_lock(hashtext('imagen jobs of ' || whose));
    select count(*) into waiting from (
      select from imagen.jobs where owner_user_id = whose and status = 'pending' limit most + 1) as jobs;
    if waiting > most then
      raise sqlstate 'PT429' using
        message = format('limits.per_owner.pending: at most %s jobs of one owner may wait', most),
        hint = 'add it again once some of them are done, or cancel some';
    end if;
  end loop;
  return null;
end
$pending$;

do $limit$
declare
  most int := nullif(current_setting('imagen.max_pending', true), '');
begin
  if most = 0 and exists (select from imagen_before where what = 'trigger imagen_jobs_pending') then
    drop trigger imagen_jobs_pending on imagen.jobs;
  elsif most > 0 and not exists (select from imagen_before where what = 'trigger imagen_jobs_pending'
                                 and how like format('%%jobs_pending(''%s'')', most)) then
    execute format('create or replace trigger imagen_jobs_pending after insert on imagen.jobs
      referencing new table as inserted for each statement execute function imagen.jobs_pending(%L)', most);
  end if;
end
$limit$;

alter table imagen.jobs enable row level security;
drop policy if exists imagen_jobs_owner_select on imagen.jobs;
create policy imagen_jobs_owner_select on imagen.jobs for select to authenticated
  using (owner_user_id = (select auth.uid()));
drop policy if exists imagen_jobs_owner_insert on imagen.jobs;
create policy imagen_jobs_owner_insert on imagen.jobs for insert to authenticated
  with check (owner_user_id = (select auth.uid()) and status = 'pending');
revoke all on imagen.jobs from anon, authenticated;
grant all on imagen.jobs to service_role;
grant select on imagen.jobs to authenticated;
grant insert (prompt, negative_prompt, backend, style, width, height, steps, seed, backend_opts, inputs, mask, strength,
  key, aspect, format, background, quality, owner_user_id, status)
  on imagen.jobs to authenticated;

-- What has become of the caller's own job: canceled at once while it waits, "running" where its worker is asked to stop.
-- Who comes without a token (the SQL editor, `imagen jobs`) has a login to the database, and may cancel any.
create or replace function imagen.cancel_job(job uuid) returns text
  language plpgsql security definer set search_path = '' as $cancel$
declare became text;
begin
  update imagen.jobs
     set cancel_requested = true,
         status = case status when 'pending' then 'canceled' else status end,
         finished_at = case status when 'pending' then now() end
   where id = job and status in ('pending', 'running')
     and (owner_user_id = (select auth.uid()) or coalesce((select auth.role()), 'service_role') = 'service_role')
  returning status into became;
  if found then
    perform pg_notify('imagen_jobs', '');
  end if;
  return became;
end
$cancel$;
revoke all on function imagen.cancel_job(uuid) from public, anon;
grant execute on function imagen.cancel_job(uuid) to authenticated, service_role;

do $others$
begin
  perform pg_temp.imagen_cascade('imagen.jobs');
  -- Owners read their rows, which tell nothing of a machine; the worker of an older release wrote its name.
  update imagen.jobs set receipt = receipt - 'host'
   where receipt ? 'host' and status not in ('pending', 'running');
  -- A web app sees its jobs go on, each user their own: Realtime asks the policies.
  if exists (select from pg_publication where pubname = 'supabase_realtime' and not puballtables)
     and not exists (select from imagen_before where what = 'publication supabase_realtime') then
    begin
      alter publication supabase_realtime add table imagen.jobs;
    exception when insufficient_privilege then
      raise warning 'by hand: as its owner, alter publication supabase_realtime add table imagen.jobs';
    end;
  end if;
end
$others$;

-- ---------------------------------------------------------------- the report

set local client_min_messages = notice;

do $report$
declare line record;
begin
  for line in
    select coalesce(new.part, old.part) as part,
           string_agg(case when old.what is null then new.what else 'changed: ' || new.what end, ', ' order by new.what)
             filter (where old.how is distinct from new.how) as news,
           coalesce(min(new.how) filter (where new.how = 'left to the Dashboard'), 'was there') as olds
    from pg_temp.imagen_state() new full join imagen_before old using (part, what)
    group by 1 order by array_position('{imagen_schema_init,imagen_schema_grants,imagen_storage_bucket,
      imagen_storage_policies,imagen_pgrst_expose,imagen_usage_init,imagen_jobs_init}', coalesce(new.part, old.part))
  loop
    if line.part = 'imagen_usage_init' and current_setting('imagen.usage_lacks', true) <> '' then
      line.olds := 'lacks: ' || current_setting('imagen.usage_lacks');
    end if;
    raise notice '%: %', line.part, coalesce(line.news, line.olds);
  end loop;
end
$report$;

commit;
