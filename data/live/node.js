// Runs the page's scripts in Node, for the tests: `node node.js a.js b.js < calls.json`. Calls
// are [[name, arguments], ...]; out come their results as JSON, null for NaN.
const fs = require("fs"),
  vm = require("vm");
for (const path of process.argv.slice(2)) vm.runInThisContext(fs.readFileSync(path, "utf8"), path);
const results = JSON.parse(fs.readFileSync(0, "utf8")).map(([name, args]) =>
  globalThis.m2kit[name](...args),
);
process.stdout.write(JSON.stringify(results));
