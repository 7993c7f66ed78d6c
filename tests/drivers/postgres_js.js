// postgres.js: a pool, statements that it prepares by itself, pipelined queries, cursors, COPY, settings of the startup
// message, a custom type; array types it has read from the catalog; listen(), cancel().
const { Readable } = require("node:stream");
const { pipeline } = require("node:stream/promises");
const { Load, PATIENCE, event, installed, version } = require("./load.js");
const postgres = installed("postgres");

const load = new Load("postgres-js", version("postgres"));
const connection = { application_name: load.name, "app.start": "kept", TimeZone: "Asia/Tokyo" };
const [mood, moods, place, places] = ["so so", ["sad", null, "so so"], '(1,"a, ""b""")', ["(2,c)", '(,"")']];
const TAGS = '"k"=>"v w", "n"=>NULL';

async function main() {
  const first = postgres(load.url, { max: 1 });
  const [{ oid }] = await first`select 'hstore'::regtype::oid as oid`;
  await first.end();
  const hstore = { to: oid, from: [oid], serialize: ({ tags }) => tags, parse: (tags) => ({ tags }) };
  const sql = postgres(load.url, { max: load.busy + 1, max_lifetime: null, connection, types: { hstore } });
  const tags = { tags: TAGS };

  const listener = postgres(load.url, { max: 1, max_lifetime: null });
  const heardAll = event();
  let times = 0;
  const hear = (payload) => (payload === "end" ? heardAll.happens() : load.heard.push(payload));
  // It would lose notifications if it had to reconnect.
  const listens = () => load.expect("times that listen() has connected", ++times, 1);
  await listener.listen(load.name, hear, listens);

  async function giveUp(id) {
    const query = sql`insert into driver_ledger (id) values (${id})`;
    setTimeout(() => query.cancel(), PATIENCE);
    load.expect("cancel()", await query.then(() => "an answer", (error) => error.code), "57014");
  }

  async function work(number) {
    for await (const id of load.rounds(number)) {
      if (id.held) {
        await giveUp(id(0));
        continue;
      }
      if (number === 0) {
        await sql.notify(load.name, id(0));
        load.notified.push(id(0));
      }
      await sql`insert into driver_ledger (id) values (${id(0)})`;
      load.acknowledge(id(0));
      await sql.begin(async (sql) => {
        await Promise.all([
          sql`insert into driver_ledger (id) values (${id(1)})`,
          sql`insert into driver_ledger (id, mood, moods, place, places, tags)
              values (${id(2)}, ${mood}, ${moods}, ${place}, ${places}, ${sql.typed.hstore(tags)})`,
        ]);
        const few = [];
        for await (const rows of sql`select generate_series(1, 10) as n`.cursor(3)) few.push(...rows.map(({ n }) => n));
        load.expect("cursor", few, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
      });
      load.acknowledge(id(1), id(2));
      await pipeline(Readable.from([`${id(3)}\n`]), await sql`copy driver_ledger (id) from stdin`.writable());
      load.acknowledge(id(3));
      const [found] = await sql`select mood, moods, place, places, tags from driver_sample where id = ${1}`;
      // postgres.js itself reads a null in an array as the text NULL.
      const read = moods.map((mood) => mood ?? "NULL");
      load.expect("values", { ...found }, { mood, moods: read, place, places, tags });
      const [kept] = await sql`select current_setting('app.start') as start, current_setting('timezone') as zone`;
      load.expect("settings", { ...kept }, { start: "kept", zone: "Asia/Tokyo" });
    }
  }
  await load.run(work, async () => {
    await sql.notify(load.name, "end");
    await heardAll.promise;
    await sql.end();
    await listener.end();
  });
}

main();
