// What the drivers in JavaScript share; the same as load.py, which says it in words.
const path = require("node:path");
const { isDeepStrictEqual } = require("node:util");
const { setTimeout: sleep } = require("node:timers/promises");

const PAUSE = 200;
const PATIENCE = 300;

// A promise, and what keeps it.
function event() {
  const event = { happened: false };
  event.promise = new Promise((resolve) => {
    event.happens = () => {
      event.happened = true;
      resolve();
    };
  });
  return event;
}

class Load {
  constructor(name, version) {
    Object.assign(this, { name, version, acknowledged: [], errors: [], wrong: [], notified: [], heard: [] });
    this.url = process.argv.at(-2);
    this.busy = Number(process.argv.at(-1));
    this.listen = `listen "${name}"; select pg_advisory_lock(20000, hashtext('${name}'))`;
    Object.assign(this, { held: event(), stop: event(), alone: event() });
    process.stdin.on("data", this.held.happens).on("end", () => this.end());
  }

  end() {
    this.stop.happens();
    this.held.happens();
  }

  async *rounds(number) {
    for (let i = 1; ; i++) {
      const idle = number === this.busy;
      const last = idle ? this.alone.happened : this.stop.happened;
      const held = idle && i === 2;
      const id = (k) => `${this.name}/${number}/${i}/${k}`;
      id.held = held;
      if (!held || !this.stop.happened) yield id;
      if (last) return;
      if (!idle) {
        await Promise.race([this.stop.promise, sleep(PAUSE)]);
      } else if (held) {
        console.log("gave up");
        await this.alone.promise;
      } else {
        await this.held.promise;
      }
    }
  }

  acknowledge(...ids) {
    this.acknowledged.push(...ids);
  }

  expect(what, found, expected) {
    if (!isDeepStrictEqual(found, expected)) {
      this.wrong.push(`${what}: ${JSON.stringify(found)}, not ${JSON.stringify(expected)}`);
    }
  }

  failed(what, error) {
    this.errors.push(`${what}: ${error.code} ${error.message}`);
    this.end();
  }

  async run(work, last) {
    const one = (number) => work(number).catch((error) => this.failed("worker", error));
    const workers = Array.from({ length: this.busy + 1 }, (_, number) => one(number));
    const idle = workers.pop();
    await Promise.all(workers);
    this.alone.happens();
    await idle;
    await last();
    this.expect("notifications", this.heard, this.notified);
    const { version, acknowledged, errors, wrong } = this;
    console.log(JSON.stringify({ version, acknowledged, errors, wrong: wrong.slice(0, 5) }));
    process.stdin.destroy();
  }
}

// A package that setup.sh has installed.
const installed = (name) => require(require.resolve(name, { paths: [process.argv[2]] }));
const version = (name) => require(path.join(process.argv[2], "node_modules", name, "package.json")).version;

module.exports = { Load, PATIENCE, event, installed, version };
