package proxy

import (
	"cmp"
	"crypto"
	"encoding/json"
	"flag"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/jose/josetest"
	"sallyport/internal/keyset"
	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
	"sallyport/internal/svid"
)

var updateRules = flag.Bool("update-rules", false, "write the ledger of rules on tokens")

const tokenRowsCSV = `p, all, in, **, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, *, /ok/**, -, allow
p, pay, in, spiffe://demo.sallyport/ns/shop/sa/web, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, *, /pay, iss=https://ci.example scope~pay, allow
p, fwd, in, spiffe://demo.sallyport/ns/shop/sa/web, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, *, /pay, iss=https://kept.example, allow
p, key, in, spiffe://demo.sallyport/ns/shop/sa/web, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, *, /orders, iss=apikey claim.sub=acme, allow
p, usr, in, spiffe://demo.sallyport/ns/shop/sa/web, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, *, /alice, iss=https://ci.example claim.sub=alice, allow
`

// tokenRig is a rig whose billing checks tokens of two issuers and API keys.
type tokenRig struct {
	*rig
	key    crypto.Signer
	apiKey string
	v      *authz.Verifier
	known  *mesh.Tokens // what v knows
	other  *svid.Source // of inventory, for whom no row asks for a token
}

// seen is what the application says it got.
type seen struct {
	Target string
	Header http.Header
}

func echo(w http.ResponseWriter, r *http.Request) {
	_ = json.NewEncoder(w).Encode(seen{r.RequestURI, r.Header})
}

func newTokenRig(t *testing.T) *tokenRig { return newTokenRigBefore(t, app(t, echo)) }

func newTokenRigBefore(t *testing.T, app string, change ...func(*rig)) *tokenRig {
	t.Helper()
	tr := &tokenRig{key: josetest.NewKey(t, "ES256")}
	jwk := josetest.JWK(t, tr.key.Public())
	jwk["kid"] = "k1"
	set := string(josetest.Set(t, jwk))
	key, hash := authz.NewAPIKey()
	tr.apiKey = key
	tokens := fmt.Sprintf(`issuers:
  - {issuer: "https://ci.example", profile: jwt, audiences: [billing], jwks: {inline: '%s'}, headers: {x-user: sub, x-team: team}}
  - {issuer: "https://kept.example", profile: jwt, audiences: [billing], jwks: {inline: '%s'}, forward: true}
api_keys:
  keys:
    - {name: acme, hashes: ["%s"], rate: 1000/h}
`, set, set, hash)
	keeper, err := keyset.New(keyset.Config{Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	v, err := authz.NewVerifier(authz.VerifierConfig{Keys: keeper, Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	snap := meshtest.Snapshot(t, map[string]string{"services.yaml": servicesYAML, "access.csv": tokenRowsCSV, "tokens.yaml": tokens}).Project(billing)
	compiled, err := authz.CompileTokens(snap.Tokens)
	if err != nil {
		t.Fatal(err)
	}
	if err := keeper.Use(compiled.Issuers()); err != nil {
		t.Fatal(err)
	}
	v.Use(compiled)
	tr.v, tr.known = v, snap.Tokens
	tr.rig = newRig(t, app, append(change, func(r *rig) {
		r.access, r.tokens = tokenRowsCSV, tokens
		r.inCfg.Tokens, r.outCfg.Tokens = v, cmp.Or(r.outCfg.Tokens, v)
		r.inCfg.Name = func() mesh.ServiceName { return "billing" }
	})...)
	tr.other = meshtest.Source(t, tr.ca, meshtest.ID("/ns/shop/sa/inventory"))
	return tr
}

// token is one of an issuer for billing, with further members.
func (r *tokenRig) token(iss, sub, more string) string {
	now := time.Now().Unix()
	return josetest.Sign(r.t, "ES256", r.key, `{"alg":"ES256","kid":"k1","typ":"JWT"}`,
		fmt.Sprintf(`{"iss":%q,"sub":%q,"aud":"billing","iat":%d,"exp":%d,"jti":"the-jti"%s}`, iss, sub, now, now+300, more))
}

// tokenUntil is one of ci.example that scope~pay lets in and that counts until
// end, a whole second, with the 30 s by which clocks may differ.
func (r *tokenRig) tokenUntil(end time.Time) string {
	exp := end.Add(-30 * time.Second).Unix()
	return josetest.Sign(r.t, "ES256", r.key, `{"alg":"ES256","kid":"k1","typ":"JWT"}`,
		fmt.Sprintf(`{"iss":"https://ci.example","sub":"alice","aud":"billing","iat":%d,"exp":%d,"scope":"pay"}`, time.Now().Unix()-60, exp))
}

// upgradedBy opens an upgraded connection that a credential let in.
func (r *tokenRig) upgradedBy(path, field string) *wire {
	w := r.dialIn(r.web)
	w.upgraded("GET " + path + " HTTP/1.1\r\nHost: billing.mesh.internal\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" + field + "\r\n\r\n")
	return w
}

// An upgraded connection does not outlive the token that let it in.
func TestAnUpgradedConnectionEndsWithItsToken(t *testing.T) {
	t.Parallel() // most of it is waiting
	r := newTokenRigBefore(t, echoApp(t))
	end := time.Now().Truncate(time.Second).Add(8 * time.Second)
	short := r.upgradedBy("/pay", "Authorization: Bearer "+r.tokenUntil(end))
	long := r.upgradedBy("/pay", "Authorization: Bearer "+r.tokenUntil(end.Add(time.Hour)))
	none := r.dialIn(r.web)
	none.upgraded(wsRequest)
	severed(t, short, "an upgraded connection whose token has expired")
	if late := time.Since(end); late < 0 || late > 20*time.Second {
		t.Errorf("closed %s after the end of the token", late)
	} else {
		t.Logf("closed %s after the end of the token", late)
	}
	await(t, func() bool { return len(closedFor(r.inAudit, "token_expired")) == 1 })
	if rec := closedFor(r.inAudit, "token_expired")[0]; rec.Src != web.String() || !has(rec.Detail, "expired", `for "alice"`) {
		t.Errorf("recorded %+v", rec)
	}
	long.echo()
	none.echo()
}

// A call that is no upgrade may go on for a while after the end of its token,
// and not for long.
func TestACallInFlightEndsAGraceAfterItsToken(t *testing.T) {
	t.Parallel() // most of it is waiting
	const grace = 2 * time.Second
	r := newTokenRigBefore(t, echoApp(t), func(r *rig) { r.tokenGrace = grace })
	end := time.Now().Truncate(time.Second).Add(8 * time.Second)
	stream := func(token string) *wire {
		w := r.dialIn(r.web)
		w.streams("GET /pay?slow HTTP/1.1\r\nHost: billing.mesh.internal\r\nAuthorization: Bearer " + token + "\r\n\r\n")
		return w
	}
	stream(r.tokenUntil(end.Add(time.Hour)))
	severed(t, stream(r.tokenUntil(end)), "an answer whose token has expired")
	if late := time.Since(end); late < grace || late > grace+20*time.Second {
		t.Errorf("closed %s after the end of the token, want %s", late, grace)
	} else {
		t.Logf("closed %s after the end of the token", late)
	}
	await(t, func() bool { return len(closedFor(r.inAudit, "token_expired")) == 1 })
	await(t, func() bool { return known(r.inbound) == 1 }) // the one whose token counts
}

// Nor its issuer, its API key and what the policy gives for them.
func TestAnUpgradedConnectionEndsWithWhatItsCredentialGave(t *testing.T) {
	r := newTokenRigBefore(t, echoApp(t))
	token := r.upgradedBy("/pay", "Authorization: Bearer "+r.token("https://ci.example", "alice", `,"scope":"pay"`))
	key := r.upgradedBy("/orders", "X-Api-Key: "+r.apiKey)
	none := r.dialIn(r.web)
	none.upgraded(wsRequest)
	r.inbound.Rejudge()
	token.echo()
	key.echo()
	compiled, err := authz.CompileTokens(&mesh.Tokens{APIKeys: []mesh.APIKey{{Name: "other", Hashes: []string{"sha256:" + strings.Repeat("0", 64)}}}})
	if err != nil {
		t.Fatal(err)
	}
	r.v.Use(compiled)
	r.inbound.Rejudge()
	severed(t, token, "one by a token that does not count any more")
	severed(t, key, "one by an API key that was taken away")
	none.echo()
	if a, b := closedFor(r.inAudit, "revoked"), closedFor(r.inAudit, "apikey_unknown"); len(a) != 1 || len(b) != 1 {
		t.Errorf("recorded %+v and %+v", a, b)
	}
}

// A requestRule is one request under a rule on tokens, and what comes of it.
type requestRule struct {
	rule   int
	name   string
	line   string // of the request, as far as the target
	fields string // below Host; {pay} and so on stand for credentials
	from   string // "inventory", or web
	want   int
	// see is what the application must have got in these fields, "" for
	// nothing; target is what it got as request target.
	see    map[string]string
	target string
	// challenge is in WWW-Authenticate; reason and detail are in the record.
	challenge, reason, detail string
	// unread requests are refused before anybody judges them.
	unread bool
	// trailer ends a chunked body.
	trailer string
}

const (
	withPay = "Authorization: Bearer {pay}\r\n"
	withKey = "X-Api-Key: {key}\r\n"
)

var requestRules = []requestRule{
	{rule: 31, name: "one token", line: "GET /pay", fields: withPay, want: 200},
	{rule: 31, name: "one API key", line: "GET /orders", fields: withKey, want: 200},
	{rule: 31, name: "two tokens", line: "GET /pay", fields: withPay + withPay, want: 400, unread: true},
	{rule: 31, name: "a token behind another credential", line: "GET /pay", fields: "Authorization: Basic YTpi\r\n" + withPay, want: 400, unread: true},
	{rule: 31, name: "a token and an API key", line: "GET /pay", fields: withPay + withKey, want: 400, challenge: `error="invalid_request"`, reason: "token_request"},
	{rule: 31, name: "two API keys", line: "GET /orders", fields: withKey + withKey, want: 400, reason: "token_request"},

	{rule: 32, name: "a query without a token", line: "GET /pay?x=access_token", fields: withPay, want: 200, target: "/pay?x=access_token"},
	{rule: 32, name: "a token in the query", line: "GET /pay?a=b&access_token={pay}", want: 400, challenge: `error="invalid_request"`, reason: "token_request"},
	{rule: 32, name: "a token in the query, escaped", line: "GET /ok/1?%61ccess%5ftoken={pay}", want: 400, reason: "token_request"},
	{rule: 32, name: "a token in a cookie is none", line: "GET /pay", fields: "Cookie: access_token={pay}\r\n", want: 401},

	{rule: 33, name: "the scheme in capitals", line: "GET /pay", fields: "Authorization: BEARER {pay}\r\n", want: 200},
	{rule: 33, name: "a list of credentials", line: "GET /pay", fields: "Authorization: Bearer {pay}, Basic YTpi\r\n", want: 400, reason: "token_request"},
	{rule: 33, name: "two blanks", line: "GET /pay", fields: "Authorization: Bearer  {pay}\r\n", want: 400, reason: "token_request"},
	{rule: 33, name: "a blank of another kind", line: "GET /ok/1", fields: "Authorization: Bearer\xa0{pay}\r\n", want: 400, reason: "token_request"},

	{rule: 34, name: "no token where no row asks for one", line: "GET /ok/1", want: 200},
	{rule: 34, name: "no token where a row asks for one", line: "GET /pay", want: 401, challenge: `Bearer realm="billing.mesh.internal"`, reason: "token"},
	{rule: 34, name: "no API key where a row asks for one", line: "GET /orders", want: 401, challenge: `APIKey realm="billing.mesh.internal"`, reason: "token"},
	{rule: 34, name: "a bad token although no row asks for one", line: "GET /ok/1", fields: "Authorization: Bearer {bad}\r\n", want: 401, challenge: `error="invalid_token"`, reason: "token_signature"},

	{rule: 35, name: "the scope", line: "GET /pay", fields: withPay, want: 200},
	{rule: 35, name: "another scope", line: "GET /pay", fields: "Authorization: Bearer {read}\r\n", want: 403, challenge: `error="insufficient_scope"`, reason: "token"},
	{rule: 35, name: "nothing that any token could give", line: "GET /nowhere", fields: withPay, want: 403, reason: "no_row"},

	{rule: 36, name: "the workload and the person", line: "GET /alice", fields: withPay, want: 200, detail: `for "alice"`},
	{rule: 36, name: "the person by another workload", line: "GET /alice", fields: withPay, from: "inventory", want: 403},
	{rule: 36, name: "another person by the workload", line: "GET /alice", fields: "Authorization: Bearer {bob}\r\n", want: 403, detail: `for "bob"`},

	{rule: 40, name: "what the application sees of the caller is ours", line: "GET /pay", fields: withPay + "X-User: root\r\nX-Team: ops\r\nX-Forwarded-Client-Cert: Hash=1\r\nSallyport-Caller: root\r\n", want: 200,
		see: map[string]string{"X-User": "alice", "X-Team": "", "X-Forwarded-Client-Cert": "By=" + billing.String() + ";URI=" + web.String(), "Sallyport-Caller": ""}},
	{rule: 40, name: "other fields pass", line: "GET /pay", fields: withPay + "X-Userland: yes\r\nX-Teams: a\r\n", want: 200, see: map[string]string{"X-Userland": "yes", "X-Teams": "a"}},
	{rule: 40, name: "not by an underscore", line: "GET /pay", fields: withPay + "x_user: root\r\nX_TEAM: ops\r\n", want: 200, see: map[string]string{"X-User": "alice", "X_user": "", "X_team": "", "X_TEAM": ""}},
	{rule: 40, name: "not twice", line: "GET /pay", fields: "X-User: root\r\n" + withPay + "X-USER: root\r\n", want: 200, see: map[string]string{"X-User": "alice"}},
	{rule: 40, name: "not without a token", line: "GET /ok/1", fields: "X-User: root\r\n", want: 200, see: map[string]string{"X-User": ""}},
	{rule: 40, name: "not in a trailer", line: "POST /pay", fields: withPay + "Transfer-Encoding: chunked\r\nTE: trailers\r\nTrailer: X-User\r\n", trailer: "X-User: root\r\n", want: 200, see: map[string]string{"X-User": "alice"}},
	{rule: 40, name: "not by naming ours in Connection", line: "GET /pay", fields: withPay + "Connection: X-User\r\n", want: 200, see: map[string]string{"X-User": "alice"}},
	{rule: 40, name: "not by hiding the token", line: "GET /pay", fields: withPay + "Connection: Authorization\r\n", want: 400, unread: true},

	{rule: 41, name: "the issuer lets the token through", line: "GET /pay", fields: "Authorization: Bearer {kept}\r\n", want: 200, see: map[string]string{"Authorization": "Bearer {kept}"}},
	{rule: 41, name: "the token ends here", line: "GET /pay", fields: withPay, want: 200, see: map[string]string{"Authorization": ""}},
	{rule: 41, name: "the API key ends here, what is for the application does not", line: "GET /orders", fields: withKey + "Authorization: Basic YTpi\r\n", want: 200,
		see: map[string]string{"X-Api-Key": "", "Authorization": "Basic YTpi"}},
	{rule: 41, name: "a claim with a line end is refused", line: "GET /pay", fields: "Authorization: Bearer {crlf}\r\n", want: 401, reason: "token_form"},

	{rule: 42, name: "a claim decides once it is verified", line: "GET /alice", fields: withPay, want: 200},
	{rule: 42, name: "a claim of a token that is not", line: "GET /alice", fields: "Authorization: Bearer {bad}\r\n", want: 401, reason: "token_signature"},
	{rule: 42, name: "a header in the place of the claim", line: "GET /alice", fields: "X-User: alice\r\n", want: 401, reason: "token"},

	{rule: 43, name: "the next call after a refusal", line: "GET /pay", fields: withPay, want: 200},
	{rule: 43, name: "a token that is no token", line: "GET /ok/1", fields: "Authorization: Bearer ...\r\n", want: 401, reason: "token_form"},

	{rule: 44, name: "who was let through", line: "GET /pay", fields: withPay, want: 200, detail: `token of "https://ci.example" for "alice", kid "k1", jti sha256:`},
	{rule: 44, name: "who was not", line: "GET /pay", fields: "Authorization: Bearer {bad}\r\n", want: 401, reason: "token_signature"},
	{rule: 44, name: "an API key by its name", line: "GET /orders", fields: withKey, want: 200, detail: `API key "acme"`},
}

func TestJWTRules(t *testing.T) {
	r := newTokenRig(t)
	pay := r.token("https://ci.example", "alice", `,"scope":"pay"`)
	sig := strings.LastIndex(pay, ".") + 1
	credentials := map[string]string{
		"{pay}": pay, "{read}": r.token("https://ci.example", "alice", `,"scope":"read"`), "{bob}": r.token("https://ci.example", "bob", ""),
		"{kept}": r.token("https://kept.example", "alice", ""), "{key}": r.apiKey,
		"{bad}":  pay[:sig] + josetest.B64(make([]byte, 64)),
		"{crlf}": r.token("https://ci.example", "alice", `,"scope":"pay","team":"a\r\nX-User: root"`),
	}
	var pairs []string
	for k, v := range credentials {
		pairs = append(pairs, k, v)
	}
	fill := strings.NewReplacer(pairs...)
	ledger := meshtest.Ledger{Path: "../authz/testdata/jwt-rules.golden", Room: "proxy"}
	for _, c := range requestRules {
		// Where rule 40 and 41 take something away, that is what is refused.
		ledger.Add(c.rule, c.want == 200 && !strings.HasPrefix(c.name, "not ") && !strings.Contains(c.name, "ends here"), c.name)
		t.Run(fmt.Sprintf("%02d %s", c.rule, c.name), func(t *testing.T) { r.run(t, &c, fill.Replace) })
	}
	ledger.Check(t, *updateRules)
	for _, rec := range r.inAudit.Records() {
		b, err := json.Marshal(rec)
		if err != nil {
			t.Fatal(err)
		}
		for name, secret := range credentials {
			// Without its signature a token is as good as told, so no part counts.
			for _, part := range append(strings.Split(secret, "."), "the-jti") {
				if len(part) > 6 && strings.Contains(string(b), part) {
					t.Errorf("a record tells of %s: %s", name, b)
				}
			}
		}
	}
	if log := r.log.String(); strings.Contains(log, pay[sig:]) || strings.Contains(log, r.apiKey) {
		t.Errorf("the log tells a credential: %s", log)
	}
}

func (r *tokenRig) run(t *testing.T, c *requestRule, fill func(string) string) {
	src := r.web
	if c.from != "" {
		src = r.other
	}
	w := newWire(t, r.inAddr, svid.ClientTLS(src, billing, "http/1.1"))
	body := ""
	if c.trailer != "" {
		body = "1\r\nx\r\n0\r\n" + c.trailer + "\r\n"
	}
	w.say(fill(c.line + " HTTP/1.1\r\nHost: billing.mesh.internal\r\n" + c.fields + "\r\n" + body))
	resp, text := w.answer(strings.Fields(c.line)[0])
	if resp.StatusCode != c.want {
		t.Fatalf("got %d %s, want %d", resp.StatusCode, text, c.want)
	}
	if c.unread {
		return
	}
	all := decisions(r.inAudit)
	rec := all[len(all)-1]
	if allowed := c.want == 200; allowed != (rec.Decision == audit.Allow) {
		t.Errorf("record %+v", rec)
	}
	if c.reason != "" && rec.Reason != c.reason || !strings.Contains(rec.Detail, c.detail) {
		t.Errorf("the record says %s, %q", rec.Reason, rec.Detail)
	}
	if c.want == 200 {
		var got seen
		if err := json.Unmarshal([]byte(text), &got); err != nil {
			t.Fatal(err)
		}
		if c.target != "" && got.Target != c.target {
			t.Errorf("the application saw %s", got.Target)
		}
		for name, want := range c.see {
			if have := strings.Join(got.Header[name], ", "); have != fill(want) {
				t.Errorf("the application saw %s: %q, want %q", name, have, fill(want))
			}
		}
		return
	}
	lines := strings.Join(resp.Header.Values("Www-Authenticate"), "; ")
	if (c.challenge != "" || c.want == 401) && (lines == "" || !strings.Contains(lines, c.challenge)) {
		t.Errorf("challenge %q, want %q", lines, c.challenge)
	}
	var told struct{ Error, Decision string }
	if err := json.Unmarshal([]byte(text), &told); err != nil || told.Decision != rec.ID || resp.Header.Get("Sallyport-Decision") != rec.ID {
		t.Errorf("told %s of decision %s: %v", text, rec.ID, err)
	}
	if rec.Detail != "" && strings.Contains(text+lines, rec.Detail) {
		t.Errorf("the client learns what was wrong: %s, %s", text, lines)
	}
}

// Without tokens in the policy nothing of a credential is looked at or taken.
func TestCredentialsOfOthersPass(t *testing.T) {
	keeper, err := keyset.New(keyset.Config{Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	v, err := authz.NewVerifier(authz.VerifierConfig{Keys: keeper, Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t, app(t, echo), func(r *rig) { r.inCfg.Tokens = v })
	w := r.dialIn(r.web)
	w.say("GET /ok/1?access_token=x HTTP/1.1\r\nHost: b\r\nAuthorization: Bearer opaque\r\nX-Api-Key: k\r\nX-User: me\r\n\r\n")
	resp, text := w.answer("GET")
	var got seen
	if err := json.Unmarshal([]byte(text), &got); err != nil || resp.StatusCode != 200 {
		t.Fatal(resp.Status, text, err)
	}
	if got.Target != "/ok/1?access_token=x" || got.Header.Get("Authorization") != "Bearer opaque" || got.Header.Get("X-Api-Key") != "k" || got.Header.Get("X-User") != "me" {
		t.Errorf("the application saw %+v", got)
	}
}

func TestTokenInQuery(t *testing.T) {
	for q, want := range map[string]bool{
		"": false, "a=b": false, "access_token": true, "access_token=": true, "a&access_token=x": true, "a;access_token=x": true, "access%5Ftoken=x": true,
		"xaccess_token=x": false, "a=access_token": false, "%zz=1&access_token=1": true, "+access_token=x": false, "access_token%00=x": false,
	} {
		if got := tokenInQuery([]byte(q)); got != want {
			t.Errorf("%q: %v", q, got)
		}
	}
}

// The sets of dropped fields follow the policy, and are made once for each.
func TestDropSets(t *testing.T) {
	var d dropSets
	names := []string{"x-user"}
	a := d.of(names)
	if d.of(slices.Clone(names)) != a {
		t.Error("made anew for the same names")
	}
	if d.of([]string{"x-team"}) == a {
		t.Error("not made anew for other names")
	}
	for _, c := range []struct {
		state, auth bool
		name        string
		want        bool
	}{
		{false, false, "tracestate", false}, {true, false, "tracestate", true}, {false, true, "tracestate", false},
		{false, false, "authorization", false}, {false, true, "Authorization", true}, {true, true, "authorization", true},
		{false, false, "x_user", true}, {true, true, "X-User", true}, {false, false, "x-forwarded-for", true},
	} {
		if got := a.pick(c.state, c.auth).Has([]byte(c.name)); got != c.want {
			t.Errorf("%s dropped with (%v, %v): %v", c.name, c.state, c.auth, got)
		}
	}
}
