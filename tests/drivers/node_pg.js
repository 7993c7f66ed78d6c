// node-postgres: a pool, named prepared statements, transactions, session settings.
// argv: connection string, number of clients. Works until standard input ends, then prints one JSON object.
const path = require("path");
const { Pool } = require(require.resolve("pg", { paths: [path.join(process.env.PGFLIP_DRIVERS, "node")] }));

const [url, count] = [process.argv[2], Number(process.argv[3])];
const acknowledged = [], errors = [], changed = [];
let stopped = false;

const pool = new Pool({ connectionString: url, max: count, idleTimeoutMillis: 0 });
pool.on("error", (e) => errors.push(`pool: ${e.message}`));

async function work(number) {
  try {
    const client = await pool.connect();
    client.on("error", (e) => errors.push(`client: ${e.message}`));
    await client.query("set app.node = 'kept'");
    for (let i = 1; !stopped; i++) {
      const ids = [0, 1].map((k) => `node-${number}-${i}-${k}`);
      await client.query({ name: "insert-one", text: "insert into driver_ledger (id) values ($1)", values: [ids[0]] });
      acknowledged.push(ids[0]);
      await client.query("begin");
      await client.query("insert into driver_ledger (id) values ($1)", [ids[1]]);
      await client.query("update driver_counter set n = n + 1 where id = $1", [number]);
      await client.query("commit");
      acknowledged.push(ids[1]);
      const kept = await client.query("select current_setting('app.node') as kept");
      if (kept.rows[0].kept !== "kept") changed.push(kept.rows[0].kept);
    }
    client.release();
  } catch (e) {
    errors.push(`${e.code}: ${e.message}`);
  }
}

const workers = Array.from({ length: count }, (_, number) => work(number));
console.log("ready");
process.stdin.resume();
process.stdin.on("end", async () => {
  stopped = true;
  await Promise.all(workers);
  await pool.end();
  console.log(JSON.stringify({ acknowledged, errors, changed }));
});
