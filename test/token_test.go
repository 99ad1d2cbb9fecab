package test

import (
	"crypto"
	"crypto/sha256"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"sallyport/internal/authz"
	"sallyport/internal/jose/josetest"
	"sallyport/internal/meshtest"
)

// A login is an issuer of tokens outside of the mesh, with its keys on a page.
type login struct {
	t     *testing.T
	key   crypto.Signer
	site  *outside
	asked atomic.Int64
	down  atomic.Bool
}

const loginHost = "login.test"

// startLogin also lets billing reach the page, by a row and a destination.
func (w *world) startLogin() *login {
	w.t.Helper()
	l := &login{t: w.t, key: josetest.NewKey(w.t, "ES256")}
	jwk := josetest.JWK(w.t, l.key.Public())
	jwk["kid"], jwk["use"], jwk["alg"] = "k1", "sig", "ES256"
	set := josetest.Set(w.t, jwk)
	l.site = w.serveOutside(loginHost, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		l.asked.Add(1)
		if l.down.Load() || r.URL.Path != "/jwks" {
			http.Error(rw, "down", http.StatusServiceUnavailable)
			return
		}
		rw.Header().Set("Cache-Control", "max-age=3600")
		_, _ = rw.Write(set)
	}))
	w.extend("egress.yaml", fmt.Sprintf(`  - host: %s
    proto: tls
    sni: strict
    private: [127.0.0.1/32]
    route: {endpoints: [%q]}
`, loginHost, strings.TrimPrefix(l.site.URL, "https://")))
	return l
}

// extend adds text at the end of a policy file.
func (w *world) extend(file, text string) {
	w.t.Helper()
	file = filepath.Join(w.policy, file)
	b, err := os.ReadFile(file)
	if err != nil {
		w.t.Fatal(err)
	}
	w.put(file, string(b)+text)
}

// token is one for billing, with further members.
func (l *login) token(sub, more string) string {
	return l.tokenUntil(time.Now().Add(5*time.Minute), sub, more)
}

// tokenUntil is one whose exp is end.
func (l *login) tokenUntil(end time.Time, sub, more string) string {
	now := time.Now().Add(-time.Minute).Unix()
	return josetest.Sign(l.t, "ES256", l.key, `{"alg":"ES256","kid":"k1","typ":"at+jwt"}`,
		fmt.Sprintf(`{"iss":"https://%s","sub":%q,"aud":"billing","client_id":"shop","jti":"j-%s","iat":%d,"exp":%d%s}`, loginHost, sub, sub, now, end.Unix(), more))
}

// proof shows that the caller holds key, for one call with token.
func (l *login) proof(key crypto.Signer, token, jti, method, url string) string {
	jwk, err := json.Marshal(josetest.JWK(l.t, key.Public()))
	if err != nil {
		l.t.Fatal(err)
	}
	sum := sha256.Sum256([]byte(token))
	return josetest.Sign(l.t, "ES256", key, fmt.Sprintf(`{"typ":"dpop+jwt","alg":"ES256","jwk":%s}`, jwk),
		fmt.Sprintf(`{"jti":%q,"htm":%q,"htu":%q,"iat":%d,"ath":%q}`, jti, method, url, time.Now().Unix(), josetest.B64(sum[:])))
}

// tokenPolicy puts rows and tokens.yaml in place, and gives the API key.
func (w *world) tokenPolicy(l *login) string {
	w.t.Helper()
	ca, err := os.ReadFile(l.site.ca)
	if err != nil {
		w.t.Fatal(err)
	}
	key, hash := authz.NewAPIKey()
	w.put(filepath.Join(w.policy, "tokens.yaml"), fmt.Sprintf(`issuers:
  - issuer: https://%s
    profile: at+jwt
    audiences: [billing]
    jwks:
      url: https://%s/jwks
      ca: |
        %s
    headers: {x-user: sub}
  - trust_domain: %s
    profile: jwt-svid
    audiences: [%s]
api_keys:
  keys:
    - {name: acme, hashes: [%q], rate: 1000/h}
`, loginHost, loginHost, strings.ReplaceAll(strings.TrimSpace(string(ca)), "\n", "\n        "), trustDomain, id("/ns/shop/sa/billing"), hash))
	row := func(name, verb, path, cond string) string {
		return fmt.Sprintf("p, %s, in, %s, %s, 8443, %s, %s, %s, allow\n", name, id("/ns/shop/sa/payment"), id("/ns/shop/sa/billing"), verb, path, cond)
	}
	w.extend("access.csv", row("tok-refund", "POST", "/v1/refunds", "iss=https://"+loginHost+" scope~refund")+
		row("tok-live", "GET", "/v1/live", "iss=https://"+loginHost+" scope~refund")+
		row("tok-bound", "GET", "/v1/vault", "iss=https://"+loginHost+" bound")+
		row("tok-key", "POST", "/v1/orders", "iss=apikey claim.sub=acme")+
		row("tok-svid", "GET", "/v1/self", "iss=spiffe://"+trustDomain+" claim.sub="+id("/ns/shop/sa/payment"))+
		fmt.Sprintf("p, tok-keys, out, %s, host:%s, 443, CONNECT, -, env.sni=same, allow\n", id("/ns/shop/sa/billing"), loginHost))
	return key
}

// Tokens of an issuer outside, whose keys come through the gateway, JWT-SVIDs
// and API keys decide beside the certificate; the application learns who calls
// and never sees the credential.
func TestCredentials(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	w := newWorld(t, time.Hour) // a token is bound to a certificate for that long
	l := w.startLogin()
	apiKey := w.tokenPolicy(l)
	w.startIssuer()
	gw := w.startGateway()
	pay, bill := &node{name: "payment"}, &node{name: "billing", gateways: gw}
	w.join(bill)
	w.join(pay)
	billing, payment := w.startNode(bill), w.startNode(pay)
	const base = "http://billing.mesh.internal/v1/"
	call := func(args ...string) (page, string) {
		r := ask[runReply](payment, "/run", curl(args...))
		return read(t, r), r.Output
	}
	bearer := func(token string) []string { return []string{"-H", "Authorization: Bearer " + token} }
	refund := l.token("alice", `,"scope":"read refund"`)
	payment.await("be let in with a token", func() bool {
		p, _ := call(append(bearer(refund), "-d", "{}", base+"refunds")...)
		return p.status == "200"
	})
	// refused checks the status, the challenge, and that a record has the decision.
	refused := func(t *testing.T, status, challenge, reason string, args ...string) {
		t.Helper()
		p, output := call(args...)
		if p.status != status || p.decision == "" || !strings.Contains(output, challenge) {
			t.Errorf("want %s with %q, got\n%s", status, challenge, output)
		}
		w.awaitAudit("billing", "decision "+p.decision, func(r auditLine) bool {
			return r.ID == p.decision && r.Decision == "deny" && r.Reason == reason && r.Src == id("/ns/shop/sa/payment")
		})
	}
	t.Run("the application learns who calls and does not see the token", func(t *testing.T) {
		p, _ := call(append(bearer(refund), "-H", "X-User: root", "-d", "{}", base+"refunds")...)
		isEcho(t, p, "POST", "/v1/refunds", id("/ns/shop/sa/payment"))
		var seen struct{ User, Authorization string }
		if err := json.Unmarshal([]byte(p.body), &seen); err != nil || seen.User != "alice" || seen.Authorization != "" {
			t.Errorf("the application saw %+v, %v", seen, err)
		}
	})
	t.Run("no token, a wrong one and too little of one", func(t *testing.T) {
		refused(t, "401", `WWW-Authenticate: Bearer realm="billing.mesh.internal"`, "token", "-d", "{}", base+"refunds")
		refused(t, "401", `error="invalid_token"`, "token_signature", append(bearer(refund[:len(refund)-8]+"AAAAAAAA"), "-d", "{}", base+"refunds")...)
		refused(t, "403", `error="insufficient_scope"`, "token", append(bearer(l.token("alice", `,"scope":"read"`)), "-d", "{}", base+"refunds")...)
		refused(t, "400", `error="invalid_request"`, "token_request", "-d", "{}", base+"refunds?access_token="+refund)
	})
	t.Run("a token for one certificate", func(t *testing.T) {
		leaf, _ := pem.Decode([]byte(ask[svidReply](payment, "/svid", struct{}{}).Leaf))
		sum := sha256.Sum256(leaf.Bytes)
		p, output := call(append(bearer(l.token("bob", fmt.Sprintf(`,"cnf":{"x5t#S256":%q}`, josetest.B64(sum[:])))), base+"vault")...)
		if p.status != "200" {
			t.Errorf("its holder is refused: %s", output)
		}
		sum[0] ^= 1
		refused(t, "401", `error="invalid_token"`, "token_binding", append(bearer(l.token("bob", fmt.Sprintf(`,"cnf":{"x5t#S256":%q}`, josetest.B64(sum[:])))), base+"vault")...)
		refused(t, "403", `error="insufficient_scope"`, "token", append(bearer(l.token("bob", "")), base+"vault")...)
	})
	t.Run("a token for a key, with a proof for each call", func(t *testing.T) {
		key := josetest.NewKey(t, "ES256")
		tok := l.token("carol", fmt.Sprintf(`,"cnf":{"jkt":%q}`, authz.Thumbprint(key.Public())))
		with := func(proof string) []string {
			return []string{"-H", "Authorization: DPoP " + tok, "-H", "DPoP: " + proof, base + "vault"}
		}
		proof := l.proof(key, tok, "p1", "GET", base+"vault")
		if p, output := call(with(proof)...); p.status != "200" {
			t.Errorf("its holder is refused: %s", output)
		}
		refused(t, "401", "WWW-Authenticate: ", "token_replay", with(proof)...)
		refused(t, "401", "WWW-Authenticate: ", "token_proof", with(l.proof(key, tok, "p2", "POST", base+"vault"))...)
		refused(t, "401", "WWW-Authenticate: ", "token_binding", with(l.proof(josetest.NewKey(t, "ES256"), tok, "p3", "GET", base+"vault"))...)
		refused(t, "401", `error="invalid_token"`, "token_binding", append(bearer(tok), base+"vault")...)
	})
	t.Run("an upgraded connection ends with its token", func(t *testing.T) {
		const leeway = 30 * time.Second
		end := time.Now().Truncate(time.Second).Add(10 * time.Second)
		tok := l.tokenUntil(end.Add(-leeway), "dave", `,"scope":"refund"`)
		r := ask[runReply](payment, "/run", curl(append(bearer(tok), "-H", "Connection: Upgrade", "-H", "Upgrade: websocket", base+"live")...))
		late := time.Since(end)
		if !strings.Contains(r.Output, " 101 ") || !strings.Contains(r.Output, "open") || late < 0 || late > 10*time.Second {
			t.Errorf("closed %s after the end of the token, with\n%s", late, r.Output)
		}
		t.Logf("closed %s after the end of the token", late)
		w.awaitAudit("billing", "the end of the connection", func(r auditLine) bool {
			return r.Kind == "tls" && r.Reason == "token_expired" && r.Src == id("/ns/shop/sa/payment") && strings.Contains(r.Detail, `for "dave"`)
		})
	})
	t.Run("a JWT-SVID of the caller", func(t *testing.T) {
		if p, output := call(append(bearer(ask[string](payment, "/jwt", id("/ns/shop/sa/billing"))), base+"self")...); p.status != "200" {
			t.Errorf("refused: %s", output)
		}
		refused(t, "401", `error="invalid_token"`, "token_claims", append(bearer(ask[string](payment, "/jwt", "somebody else")), base+"self")...)
	})
	t.Run("an API key", func(t *testing.T) {
		if p, output := call("-H", "X-Api-Key: "+apiKey, "-d", "{}", base+"orders"); p.status != "200" || strings.Contains(output, apiKey) {
			t.Errorf("refused, or told: %s", output)
		}
		refused(t, "401", `APIKey realm=`, "apikey_unknown", "-H", "X-Api-Key: "+apiKey+"x", "-d", "{}", base+"orders")
	})
	t.Run("keys stay over a restart while their issuer is down", func(t *testing.T) {
		l.down.Store(true)
		billing.stop()
		w.write("billing", w.sidecarConfig(bill, ""))
		was := l.asked.Load()
		w.startNode(bill)
		payment.await("be let in again", func() bool {
			p, _ := call(append(bearer(refund), "-d", "{}", base+"refunds")...)
			return p.status == "200"
		})
		t.Logf("the page was asked %d times before the restart and %d times since", was, l.asked.Load()-was)
	})
	t.Run("no log tells a credential", func(t *testing.T) {
		for _, name := range []string{"billing", "payment", "gateway", "issuer"} {
			b, err := os.ReadFile(w.path(name, "audit.jsonl"))
			if err != nil {
				t.Fatal(err)
			}
			for _, secret := range []string{apiKey, refund, refund[strings.LastIndex(refund, ".")+1:]} {
				if strings.Contains(string(b), secret) || strings.Contains(billing.out.String(), secret) {
					t.Errorf("a log of %s holds a credential", name)
				}
			}
			w.awaitVerified(w.path(name, "audit.jsonl"))
		}
	})
}
