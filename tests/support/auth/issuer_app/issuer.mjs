// A real issuer of access tokens: oidc-provider (OpenID certified) on loopback, controlled by lines of JSON.
//
// tests/support/auth/issuer.py starts and controls it. The first argument is its configuration:
//   {"path": "/realms/x" or "", "discovery": "openid" or "oauth", "alg": "RS256", "ttl_s": 3600,
//    "clients": [{"id", "secret", "scope", "claims": {more claims of this client's tokens}}]}
// It listens on a free port and prints {"issuer": ...}. Then each line on stdin is a command, {"do": ...},
// answered by one line on stdout, {"ok": ...} or {"error": ...}. It exits when stdin ends, so that it
// cannot outlive its parent.
//
// Configuration that oidc-provider needs to issue tokens as RFC 9068 describes them:
// - It signs JWTs only for a resource (RFC 8707): without `resource` in the token request the token is
//   opaque. Any resource is accepted here and becomes `aud`.
// - Scopes of a resource are not OpenID scopes: they are named three times (`scopes`, the client, the resource).
// - Its keys are fixed at creation: rotation creates another Provider behind the same HTTP server.
// - Its default for a client's ID tokens is RS256, which it checks even if none are issued, so the
//   default is set to the key's algorithm.
import { createServer } from 'node:http';
import { generateKeyPairSync } from 'node:crypto';
import { createInterface } from 'node:readline';
import Provider from 'oidc-provider';

// stdout is for answers, and oidc-provider's notices go there.
console.info = console.error;

const given = JSON.parse(process.argv[2]);
const scopes = [...new Set(given.clients.flatMap((client) => client.scope.split(' ')))].filter(Boolean);
const claims = new Map(given.clients.map((client) => [client.id, client.claims]));

const KEYS = {
  RS256: ['rsa', { modulusLength: 2048 }],
  PS256: ['rsa', { modulusLength: 2048 }],
  ES256: ['ec', { namedCurve: 'P-256' }],
  EdDSA: ['ed25519', {}],
};
let keyCount = 0; // numbers the keys

function newKey(alg) {
  const [type, options] = KEYS[alg];
  const jwk = generateKeyPairSync(type, options).privateKey.export({ format: 'jwk' });
  return { ...jwk, alg, use: 'sig', kid: `key-${(keyCount += 1)}` };
}

function newHandler(issuer, keys) {
  const [{ alg, kid }] = keys; // the first one signs
  const provider = new Provider(issuer, {
    jwks: { keys },
    scopes,
    ttl: { ClientCredentials: given.ttl_s },
    cookies: { keys: ['not used: there are no sign-ins'] },
    clientDefaults: { id_token_signed_response_alg: alg },
    clients: given.clients.map((client) => ({
      client_id: client.id,
      client_secret: client.secret,
      scope: client.scope,
      grant_types: ['client_credentials'],
      response_types: [],
      redirect_uris: [],
      token_endpoint_auth_method: 'client_secret_basic',
    })),
    extraTokenClaims: async (ctx, token) => claims.get(token.clientId),
    features: {
      devInteractions: { enabled: false },
      clientCredentials: { enabled: true },
      resourceIndicators: {
        enabled: true,
        getResourceServerInfo: async () => ({
          scope: scopes.join(' '),
          accessTokenFormat: 'jwt',
          accessTokenTTL: given.ttl_s,
          jwt: { sign: { alg, kid } },
        }),
      },
    },
  });
  return provider.callback();
}

const OAUTH = '/.well-known/oauth-authorization-server';
let issuer;
let keys = [newKey(given.alg)];
let handler;
let mode = 'up'; // or: closed (each connection is cut), unavailable (503), held (the JWKS waits)
let counts = { jwks: 0, metadata: 0, cut: 0 };
let held = [];
let waiting = []; // commands that wait for a number of JWKS requests

function serve(request, response) {
  const url = localUrl(request.url);
  if (url === '/jwks') {
    counts.jwks += 1;
    waiting = waiting.filter(({ count, reached }) => counts.jwks < count || reached(counts.jwks));
  } else if (url?.startsWith('/.well-known/')) {
    counts.metadata += 1;
  }
  if (mode === 'unavailable') {
    response.writeHead(503, { 'content-type': 'text/plain' }).end('down for a test\n');
  } else if (url === undefined) {
    response.writeHead(404).end();
  } else {
    // How oidc-provider is mounted under a path.
    request.originalUrl = given.path + url;
    request.url = url;
    if (mode === 'held' && url === '/jwks') held.push(() => handler(request, response));
    else handler(request, response);
  }
}

// Returns the part of the URL for oidc-provider, or undefined. For an issuer with a path, OpenID Connect
// Discovery and RFC 8414, 3.1 put the metadata in different places: `discovery` chooses one.
function localUrl(url) {
  if (given.discovery === 'oauth') {
    if (url.endsWith('/.well-known/openid-configuration')) return undefined;
    if (url === OAUTH + given.path) return OAUTH;
  }
  return url.startsWith(`${given.path}/`) ? url.slice(given.path.length) : undefined;
}

function change(newKeys) {
  keys = newKeys;
  handler = newHandler(issuer, keys);
  return keys[0].kid;
}

const commands = {
  // The first state, at the same URL.
  reset: () => {
    commands.mode({ mode: 'up' });
    counts = { jwks: 0, metadata: 0, cut: 0 };
    keyCount = 0;
    return change([newKey(given.alg)]);
  },
  // All keys are published, the new one signs.
  rotate: ({ alg }) => change([newKey(alg ?? given.alg), ...keys]),
  // Only the signing key stays.
  drop: () => change(keys.slice(0, 1)),
  kid: () => keys[0].kid,
  counts: () => counts,
  mode: ({ mode: next }) => {
    mode = next;
    // The port stays open, or another process could take it.
    if (mode === 'closed') server.closeAllConnections();
    if (mode !== 'held') held.splice(0).forEach((release) => release());
    return mode;
  },
  wait_for_jwks_requests: ({ count }) => new Promise((resolve) => {
    if (counts.jwks >= count) resolve(counts.jwks);
    else waiting.push({ count, reached: (now) => resolve(now) });
  }),
};

const say = (message) => process.stdout.write(`${JSON.stringify(message)}\n`);

const server = createServer(serve);
server.on('connection', (socket) => {
  if (mode === 'closed') {
    counts.cut += 1;
    socket.destroy();
  }
});
server.listen(0, '127.0.0.1', () => {
  issuer = `http://127.0.0.1:${server.address().port}${given.path}`;
  change(keys);
  say({ issuer });
});

createInterface({ input: process.stdin })
  .on('line', async (line) => {
    try {
      const command = JSON.parse(line);
      say({ ok: await commands[command.do](command) });
    } catch (error) {
      say({ error: String(error) });
    }
  })
  .on('close', () => process.exit(0));
