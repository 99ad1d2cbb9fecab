package proxy

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"sallyport/internal/authz"
	"sallyport/internal/jose"
)

const claimRoutes = `service: billing
routes:
  - name: gold
    matches: [{path: {prefix: /ok}, claims: {tier: gold, iss: "https://ci.example"}}]
    answer: {set: {X-Route: gold}}
  - name: lounge
    matches: [{path: {prefix: /ok/lounge}, region: {in: [eu], claim: region}}]
    answer: {set: {X-Route: lounge}}
  - name: each
    matches: [{path: {prefix: /ok/each}}]
    limit: {rate: 1, burst: 2, by: "claim:sub"}
  - name: rest
    matches: [{path: {prefix: /ok}}]
    answer: {set: {X-Route: rest}}
`

func TestClaimsChooseTheRoute(t *testing.T) {
	r := newTokenRigBefore(t, app(t, echo), func(r *rig) { r.routes = claimRoutes })
	gold := r.token("https://ci.example", "alice", `,"tier":"gold","region":"eu"`)
	for _, tt := range []struct {
		name, path, auth string
		status           int
		route            string
	}{
		{"a claim that holds", "/ok/1", "Bearer " + gold, 200, "gold"},
		{"no token", "/ok/1", "", 200, "rest"},
		{"another value", "/ok/1", "Bearer " + r.token("https://ci.example", "alice", `,"tier":"silver"`), 200, "rest"},
		{"no such claim", "/ok/1", "Bearer " + r.token("https://ci.example", "alice", ""), 200, "rest"},
		{"a claim of several values", "/ok/1", "Bearer " + r.token("https://ci.example", "alice", `,"tier":["gold"]`), 200, "rest"},
		{"the claim of another issuer", "/ok/1", "Bearer " + r.token("https://kept.example", "alice", `,"tier":"gold"`), 200, "rest"},
		{"a region", "/ok/lounge/1", "Bearer " + r.token("https://ci.example", "alice", `,"region":"eu"`), 200, "lounge"},
		{"another region", "/ok/lounge/1", "Bearer " + r.token("https://ci.example", "alice", `,"region":"us"`), 200, "rest"},
		// What does not count has no claims, and the service refuses it.
		{"a signature of nobody", "/ok/1", "Bearer " + gold[:strings.LastIndexByte(gold, '.')+1] + strings.Repeat("A", 86), 401, "rest"},
		{"a token of nobody", "/ok/1", "Bearer " + r.token("https://evil.example", "alice", `,"tier":"gold"`), 401, "rest"},
		{"no token at all", "/ok/1", "Bearer x", 401, "rest"},
	} {
		var fields []string
		if tt.auth != "" {
			fields = append(fields, "Authorization: "+tt.auth)
		}
		resp, body := r.ask("GET", tt.path, fields...)
		if resp.StatusCode != tt.status || resp.Header.Get("X-Route") != tt.route {
			t.Errorf("%s: %d by route %q, want %d by %q: %s", tt.name, resp.StatusCode, resp.Header.Get("X-Route"), tt.status, tt.route, body)
		}
	}
	// A connection keeps nothing of the call before.
	w := r.dial()
	for _, tt := range []struct{ field, route string }{{"Authorization: Bearer " + gold + "\r\n", "gold"}, {"", "rest"}} {
		w.say("GET http://billing.mesh.internal/ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\n" + tt.field + "\r\n")
		if resp, _ := w.answer("GET"); resp.Header.Get("X-Route") != tt.route {
			t.Errorf("on one connection: route %q, want %q", resp.Header.Get("X-Route"), tt.route)
		}
	}
}

func TestALimitCountsByAClaim(t *testing.T) {
	r := newTokenRigBefore(t, app(t, echo), func(r *rig) { r.routes = claimRoutes })
	alice, bob := "Authorization: Bearer "+r.token("https://ci.example", "alice", ""), "Authorization: Bearer "+r.token("https://ci.example", "bob", "")
	passed := func(fields ...string) (n int) {
		for range 5 {
			if resp, _ := r.ask("GET", "/ok/each/1", fields...); resp.StatusCode != 429 {
				n++
			}
		}
		return n
	}
	for name, fields := range map[string][]string{"alice": {alice}, "bob": {bob}} {
		began := time.Now()
		if n := passed(fields...); n < 2 || n > 2+int(time.Since(began).Seconds()) {
			t.Errorf("%d of five calls of %s pass at once, want 2, and one a second", n, name)
		}
	}
	// Those without the claim are counted as those of one: nobody gets more by
	// showing a token that does not count.
	began := time.Now()
	n := passed() + passed("Authorization: Bearer "+r.token("https://evil.example", "x", "")) + passed("Authorization: Bearer "+r.token("https://evil.example", "y", ""))
	if n < 2 || n > 2+int(time.Since(began).Seconds()) {
		t.Errorf("%d of fifteen calls without a claim pass at once, want 2, and one a second", n)
	}
}

// noKeys are those of issuers whose keys nobody has got.
type noKeys struct{ authz.Keys }

func (noKeys) Find(context.Context, string, *jose.Token) (jose.Key, bool, error) {
	return jose.Key{}, false, errors.New("not now")
}

func (noKeys) Generation(string) uint64 { return 0 }

// A call that would go by a token which cannot be checked goes nowhere.
func TestWhatCannotBeCheckedTakesNoRoute(t *testing.T) {
	blind, err := authz.NewVerifier(authz.VerifierConfig{Keys: noKeys{}, Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	r := newTokenRigBefore(t, app(t, echo), func(r *rig) { r.routes, r.outCfg.Tokens = claimRoutes, blind })
	set, err := authz.CompileTokens(r.known)
	if err != nil {
		t.Fatal(err)
	}
	blind.Use(set)
	for _, path := range []string{"/ok/1", "/ok/each/1"} {
		resp, _ := r.ask("GET", path, "Authorization: Bearer "+r.token("https://ci.example", "alice", `,"tier":"gold"`))
		if resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Sallyport-Refused") != "credential" {
			t.Errorf("%s: %d, refused for %q", path, resp.StatusCode, resp.Header.Get("Sallyport-Refused"))
		}
	}
	if resp, _ := r.ask("GET", "/ok/1"); resp.StatusCode != 200 {
		t.Errorf("a call without a token: %d", resp.StatusCode)
	}
}
