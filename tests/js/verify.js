// Standard Webhooks' verifier for Node.js, asked by tests/py/test_rotation.py.
//
//   node verify.js <folder of the package> <file>    -> [true, false, …]
//
// The file is [{"secret": …, "headers": {…}, "body": base64}, …].
"use strict";

const fs = require("node:fs");
const { Webhook, WebhookVerificationError } = require(process.argv[2]);

function accepts({ secret, headers, body }) {
  try {
    new Webhook(secret).verify(Buffer.from(body, "base64"), headers);
    return true;
  } catch (error) {
    if (error instanceof WebhookVerificationError) {
      return false;
    }
    throw error;
  }
}

const asked = JSON.parse(fs.readFileSync(process.argv[3], "utf8"));
console.log(JSON.stringify(asked.map(accepts)));
