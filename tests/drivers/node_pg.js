// node-postgres: a pool, named prepared statements, transactions, type parsers for types of its own, notifications,
// query_timeout.
const { Load, PATIENCE, installed, version } = require("./load.js");
const pg = installed("pg");

const load = new Load("node-pg", version("pg"));
const PARAMETERS = ["so so", ["sad", null, "so so"], '(1,"a, ""b""")', ["(2,c)", '(,"")'], '"k"=>"v w", "n"=>NULL'];
const [mood, moods, place, places, tags] = PARAMETERS;
// What a parser has seen is wrapped: a value that comes without has come as another type.
const VALUES = { mood: { mood }, moods, place: { place }, places, tags: { tags } };
const WRITE = "insert into driver_ledger (id, mood, moods, place, places, tags) values ($1, $2, $3, $4, $5, $6)";
const READ = "select mood, moods, place, places, tags from driver_sample where id = $1";

const settings = { application_name: load.name, options: "-c app.start=kept", idleTimeoutMillis: 0 };
const pool = new pg.Pool({ connectionString: load.url, max: load.busy + 1, ...settings });
pool.on("error", (error) => load.failed("pool", error));

async function parsers() {
  const types = "select typname, oid, typarray from pg_type where typname ~ '^(driver_|hstore$)'";
  const { rows } = await pool.query(types);
  const oids = Object.fromEntries(rows.map(({ typname, oid, typarray }) => [typname, [oid, typarray]]));
  const array = (text) => pg.types.arrayParser.create(text, (one) => one).parse();
  pg.types.setTypeParser(oids.driver_mood[0], (mood) => ({ mood }));
  pg.types.setTypeParser(oids.driver_mood[1], array);
  pg.types.setTypeParser(oids.driver_place[0], (place) => ({ place }));
  pg.types.setTypeParser(oids.driver_place[1], array);
  pg.types.setTypeParser(oids.hstore[0], (tags) => ({ tags }));
}
const listener = new pg.Client(load.url);
listener.on("notification", ({ payload }) => load.heard.push(payload));

async function prepare() {
  await parsers();
  await listener.connect();
  await listener.query(load.listen);
}
const ready = prepare();

// query_timeout tells no server: the statement runs all the same, as it would have run behind a lock.
async function giveUp(client, id) {
  const query = { text: "insert into driver_ledger (id) values ($1)", values: [id], query_timeout: PATIENCE };
  const found = await client.query(query).then(() => "an answer", (error) => error.message);
  load.expect("query_timeout", found, "Query read timeout");
  load.acknowledge(id);
}

async function work(number) {
  await ready;
  const client = await pool.connect();
  client.on("error", (error) => load.failed("client", error));
  await client.query("set app.node = 'kept'");
  await client.query("set timezone = 'Asia/Tokyo'");
  for await (const id of load.rounds(number)) {
    if (id.held) {
      await giveUp(client, id(0));
      continue;
    }
    if (number === 0) {
      await client.query("select pg_notify($1, $2)", [load.name, id(0)]);
      load.notified.push(id(0));
    }
    await client.query({ name: "insert-one", text: "insert into driver_ledger (id) values ($1)", values: [id(0)] });
    load.acknowledge(id(0));
    await client.query("begin");
    await client.query("insert into driver_ledger (id) values ($1)", [id(1)]);
    await client.query("savepoint here");
    await client.query({ name: "write", text: WRITE, values: [id(2), ...PARAMETERS] });
    await client.query("commit");
    load.acknowledge(id(1), id(2));
    const found = await client.query({ name: "read", text: READ, values: [1] });
    load.expect("values", { ...found.rows[0] }, VALUES);
    const kept = await client.query({
      text: "select current_setting('app.start'), current_setting('app.node'), current_setting('timezone')",
      rowMode: "array",
    });
    load.expect("settings", kept.rows[0], ["kept", "kept", "Asia/Tokyo"]);
  }
  client.release();
}

load.run(work, async () => {
  await listener.query("select 1");
  await listener.end();
  await pool.end();
});
