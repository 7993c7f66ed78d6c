-- What drivers read and write: once in the application's database, by a superuser. Types of its own are what drivers keep
-- OIDs of. driver_sample has no row yet: sample.sql.
create extension hstore with schema public;
set role ledger_app;
create type public.driver_mood as enum ('sad', 'ok', 'so so');
create type public.driver_place as (x int, name text);
create table public.driver_sample (
    id int primary key,
    mood public.driver_mood not null,
    moods public.driver_mood[] not null,
    place public.driver_place not null,
    places public.driver_place[] not null,
    tags public.hstore not null
);
-- No unique constraint but n's: what is written twice is to be seen. An id is driver/worker/round/number.
create table public.driver_ledger (
    n bigint generated always as identity primary key,
    port int not null default current_setting('port')::int,
    id text not null,
    mood public.driver_mood,
    moods public.driver_mood[],
    place public.driver_place,
    places public.driver_place[],
    tags public.hstore
);
create table public.driver_counter (id text primary key, n bigint not null);
reset role;
