// A real issuer of access tokens: oidc-provider (OpenID certified) on loopback, steered by lines of JSON.
//
// tests/support/auth/issuer.py starts it and speaks for it. The first argument is its configuration:
//   {"path": "/realms/x" or "", "discovery": "openid" or "oauth", "alg": "RS256", "ttl_s": 3600,
//    "clients": [{"id", "secret", "scope", "claims": {more claims of this client's tokens}}]}
// It listens on a free port and says {"issuer": ...}. Then each line on stdin is a command, {"do": ...},
// and is answered by one line on stdout, {"ok": ...} or {"error": ...}. It ends when stdin does, so
// that it cannot outlive its parent.
//
// What oidc-provider needs help with, to issue what RFC 9068 describes:
// - It signs JWTs only for a resource (RFC 8707): without `resource` in the token request the token is
//   opaque. Any resource is taken here, and becomes `aud`.
// - Scopes of a resource are not OpenID scopes: they are named three times (`scopes`, the client, the resource).
// - Its keys are fixed for its life: rotation makes another Provider behind the same HTTP server.
// - Its default for a client's ID tokens is RS256, which it checks even where none are issued: the
//   default follows the key.
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
let made = 0; // keys, which are numbered

function newKey(alg) {
  const [type, options] = KEYS[alg];
  const jwk = generateKeyPairSync(type, options).privateKey.export({ format: 'jwk' });
  return { ...jwk, alg, use: 'sig', kid: `key-${(made += 1)}` };
}

function newHandler(issuer, keys) {
  const [{ alg, kid }] = keys; // the first one signs
  const provider = new Provider(issuer, {
    jwks: { keys },
    scopes,
    ttl: { ClientCredentials: given.ttl_s },
    cookies: { keys: ['not used: nobody signs in here'] },
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
let seen = { jwks: 0, metadata: 0, cut: 0 };
let held = [];
let waiting = []; // what waits for a number of JWKS requests

function serve(request, response) {
  const url = localUrl(request.url);
  if (url === '/jwks') {
    seen.jwks += 1;
    waiting = waiting.filter(({ count, reached }) => seen.jwks < count || reached(seen.jwks));
  } else if (url?.startsWith('/.well-known/')) {
    seen.metadata += 1;
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

// The part of the URL that oidc-provider knows; undefined for none. For an issuer with a path OpenID
// Connect Discovery and RFC 8414, 3.1, disagree where its metadata is: `discovery` says which one holds.
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
  // As if newly started, in the same place.
  reset: () => {
    commands.mode({ mode: 'up' });
    seen = { jwks: 0, metadata: 0, cut: 0 };
    made = 0;
    return change([newKey(given.alg)]);
  },
  // Both keys are published, the new one signs.
  rotate: ({ alg }) => change([newKey(alg ?? given.alg), ...keys]),
  // Only the key that signs is left.
  drop: () => change(keys.slice(0, 1)),
  kid: () => keys[0].kid,
  seen: () => seen,
  mode: ({ mode: next }) => {
    mode = next;
    // The port stays ours: closing it would let another process have it.
    if (mode === 'closed') server.closeAllConnections();
    if (mode !== 'held') held.splice(0).forEach((release) => release());
    return mode;
  },
  jwks_asked: ({ count }) => new Promise((resolve) => {
    if (seen.jwks >= count) resolve(seen.jwks);
    else waiting.push({ count, reached: (now) => resolve(now) });
  }),
};

const say = (message) => process.stdout.write(`${JSON.stringify(message)}\n`);

const server = createServer(serve);
server.on('connection', (socket) => {
  if (mode === 'closed') {
    seen.cut += 1;
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
