package page_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"sallyport/internal/mesh"
	"sallyport/internal/page"
	"sallyport/internal/page/pagetest"
)

const (
	oidcClient = "the page"
	oidcSecret = "s3:cret/+"
)

// A login is an OpenID provider: discovery, authorization, token and keys, as the
// specifications have them.
type login struct {
	t   *testing.T
	srv *httptest.Server
	key *ecdsa.PrivateKey
	now func() time.Time

	mu    sync.Mutex // guards the fields below
	codes map[string]url.Values
	user  jwt.MapClaims
	// spoil changes the token before it is signed, and key and method with it.
	spoil func(*jwt.Token) any
	asked []url.Values
}

func openLogin(t *testing.T, now func() time.Time) *login {
	t.Helper()
	l := &login{t: t, now: now, codes: map[string]url.Values{}}
	var err error
	if l.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, v any) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(v)
	}
	mux.HandleFunc("GET /.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, map[string]any{
			"issuer": l.srv.URL, "authorization_endpoint": l.srv.URL + "/auth?tenant=a", "token_endpoint": l.srv.URL + "/token", "jwks_uri": l.srv.URL + "/keys",
			"response_types_supported": []string{"code"}, "code_challenge_methods_supported": []string{"S256"},
		})
	})
	mux.HandleFunc("GET /keys", func(w http.ResponseWriter, _ *http.Request) {
		b64 := base64.RawURLEncoding.EncodeToString
		raw, err := l.key.PublicKey.Bytes()
		if err != nil {
			t.Error(err)
			return
		}
		answer(w, map[string]any{"keys": []map[string]string{{
			"kty": "EC", "crv": "P-256", "kid": "k1", "use": "sig", "alg": "ES256", "x": b64(raw[1:33]), "y": b64(raw[33:]),
		}}})
	})
	mux.HandleFunc("GET /auth", func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		if q.Get("response_type") != "code" || q.Get("client_id") != oidcClient || q.Get("code_challenge_method") != "S256" || len(q.Get("code_challenge")) != 43 ||
			q.Get("tenant") != "a" || !strings.HasPrefix(q.Get("scope"), "openid ") || q.Get("state") == "" || q.Get("nonce") == "" {
			http.Error(w, "no such request", http.StatusBadRequest)
			return
		}
		code := rand.Text()
		l.mu.Lock()
		l.codes[code] = q
		l.asked = append(l.asked, q)
		l.mu.Unlock()
		http.Redirect(w, r, q.Get("redirect_uri")+"?"+url.Values{"code": {code}, "state": {q.Get("state")}, "iss": {l.srv.URL}}.Encode(), http.StatusFound)
	})
	mux.HandleFunc("POST /token", func(w http.ResponseWriter, r *http.Request) {
		id, secret, ok := r.BasicAuth()
		l.mu.Lock()
		defer l.mu.Unlock()
		q, known := l.codes[r.PostFormValue("code")]
		delete(l.codes, r.PostFormValue("code"))
		sum := sha256.Sum256([]byte(r.PostFormValue("code_verifier")))
		if !ok || id != url.QueryEscape(oidcClient) || secret != url.QueryEscape(oidcSecret) || !known || r.PostFormValue("grant_type") != "authorization_code" ||
			r.PostFormValue("redirect_uri") != q.Get("redirect_uri") || base64.RawURLEncoding.EncodeToString(sum[:]) != q.Get("code_challenge") {
			http.Error(w, `{"error":"invalid_grant"}`, http.StatusBadRequest)
			return
		}
		answer(w, map[string]string{"access_token": "x", "token_type": "Bearer", "id_token": l.token(q.Get("nonce"))})
	})
	l.srv = httptest.NewTLSServer(mux)
	t.Cleanup(l.srv.Close)
	return l
}

// token is called with the lock held.
func (l *login) token(nonce string) string {
	claims := jwt.MapClaims{
		"iss": l.srv.URL, "aud": oidcClient, "sub": "alice", "nonce": nonce, "iat": l.now().Unix(), "exp": l.now().Add(5 * time.Minute).Unix(),
	}
	maps.Copy(claims, l.user)
	tok := jwt.NewWithClaims(jwt.SigningMethodES256, claims)
	tok.Header["kid"] = "k1"
	var key any = l.key
	if l.spoil != nil {
		key = l.spoil(tok)
	}
	s, err := tok.SignedString(key)
	if err != nil {
		l.t.Error(err)
	}
	return s
}

// next says who signs in, and how its token is spoilt.
func (l *login) next(user jwt.MapClaims, spoil func(*jwt.Token) any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.user, l.spoil = user, spoil
}

// A porch is a page that people enter by a provider.
type porch struct {
	t     *testing.T
	mesh  *pagetest.Mesh
	login *login
	url   string
	told  atomic.Int64 // lines of the log
	mu    sync.Mutex   // guards late
	late  time.Duration
}

// Enabled, Handle, WithAttrs and WithGroup count the lines that an operator reads.
func (p *porch) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelWarn }
func (p *porch) Handle(context.Context, slog.Record) error    { p.told.Add(1); return nil }
func (p *porch) WithAttrs([]slog.Attr) slog.Handler           { return p }
func (p *porch) WithGroup(string) slog.Handler                { return p }

func (p *porch) now() time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Now().Add(p.late)
}

func openPorch(t *testing.T) *porch {
	t.Helper()
	p := &porch{t: t, mesh: pagetest.New(30, time.Now())}
	p.login = openLogin(t, p.now)
	srv := httptest.NewUnstartedServer(nil)
	p.url = "https://" + srv.Listener.Addr().String()
	conf := p.mesh.Config()
	conf.Now, conf.Log = p.now, slog.New(p)
	conf.OIDC = &page.OIDC{
		Issuer: p.login.srv.URL, Client: oidcClient, Secret: oidcSecret, URL: p.url, Viewers: []string{"staff"}, Operators: []string{"ops"}, Admins: []string{"admins"},
		Scopes: []string{"groups"}, CA: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.login.srv.Certificate().Raw})),
	}
	made, err := page.New(conf)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- made.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	srv.Config.Handler = made.Handler()
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return p
}

// A browser keeps cookies, and the session that the page's script keeps.
type browser struct {
	p       *porch
	c       *http.Client
	session string
	csrf    string
}

func (p *porch) browser() *browser {
	jar, err := cookiejar.New(nil)
	if err != nil {
		p.t.Fatal(err)
	}
	c := p.login.srv.Client() // httptest has one certificate for all
	return &browser{p: p, c: &http.Client{Transport: c.Transport, Jar: jar}}
}

func (b *browser) do(method, path, body string) (int, string) {
	b.p.t.Helper()
	at := path
	if strings.HasPrefix(path, "/") {
		at = b.p.url + path
	}
	req, err := http.NewRequestWithContext(b.p.t.Context(), method, at, strings.NewReader(body))
	if err != nil {
		b.p.t.Fatal(err)
	}
	req.Header.Set("Origin", b.p.url)
	if b.session != "" {
		req.Header.Set("Authorization", "Bearer "+b.session)
		req.Header.Set("Sallyport-Csrf", b.csrf)
	}
	resp, err := b.c.Do(req)
	if err != nil {
		b.p.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		b.p.t.Fatal(err)
	}
	if resp.StatusCode == http.StatusOK && resp.Request.URL.Fragment != "" {
		return resp.StatusCode, resp.Request.URL.Fragment
	}
	return resp.StatusCode, string(text)
}

// signIn goes all the way, and returns what the page says at its end.
func (b *browser) signIn() (int, string) {
	b.p.t.Helper()
	code, token := b.do("GET", "/oidc/signin", "")
	if code != http.StatusOK {
		return code, token
	}
	code, body := b.do("POST", "/session", `{"token":"`+token+`"}`)
	var got struct{ Session, Csrf, Who string }
	if err := json.Unmarshal([]byte(body), &got); code != http.StatusOK || err != nil {
		return code, body
	}
	b.session, b.csrf = got.Session, got.Csrf
	if again, _ := b.do("POST", "/session", `{"token":"`+token+`"}`); again != http.StatusForbidden {
		b.p.t.Errorf("a token of a sign-in opens the page twice: %d", again)
	}
	return code, got.Who
}

func TestPeopleEnterByAProvider(t *testing.T) {
	p := openPorch(t)
	const move = `{"service":"shop-cart","route":"default","move":"promote"}`
	for _, tt := range []struct {
		name  string
		user  jwt.MapClaims
		who   string
		moves int
	}{
		{"a viewer", jwt.MapClaims{"groups": []string{"x", "staff"}}, "spiffe://corp.example/oidc/viewer/alice", http.StatusForbidden},
		{"an operator", jwt.MapClaims{"groups": "ops"}, "spiffe://corp.example/oidc/operator/alice", http.StatusNoContent},
		{"an admin with other roles", jwt.MapClaims{"sub": "a|b@c", "groups": []string{"staff", "admins"}}, "spiffe://corp.example/oidc/admin/sha256-", http.StatusNoContent},
	} {
		// A row that gives all to everybody gives a person nothing.
		p.mesh.Admin(mesh.AdminRule{ID: "all", Caller: "spiffe://corp.example/**", Method: "*", On: mesh.Any, Effect: mesh.Allow})
		p.login.next(tt.user, nil)
		b := p.browser()
		if code, body := b.do("GET", "/view/denied", ""); code != http.StatusUnauthorized {
			t.Fatalf("%s sees the page before: %d %s", tt.name, code, body)
		}
		code, who := b.signIn()
		if code != http.StatusOK || !strings.HasPrefix(who, tt.who) {
			t.Fatalf("%s: %d %s", tt.name, code, who)
		}
		if c := p.mesh.Calls[len(p.mesh.Calls)-1]; c.Method != "page.Enter" || c.Caller.String() != who || !c.Allowed {
			t.Errorf("%s: recorded %+v", tt.name, c)
		}
		if code, _ := b.do("GET", "/view/denied", ""); code != http.StatusOK {
			t.Errorf("%s does not see the page: %d", tt.name, code)
		}
		p.mesh.Admin(mesh.AdminRule{ID: "no", Caller: mesh.Any, Method: "mesh.MoveRollout", On: mesh.Any, Effect: mesh.Deny})
		if code, body := b.do("POST", "/rollout", move); code != http.StatusForbidden {
			t.Errorf("%s promotes against a row: %d %s", tt.name, code, body)
		}
		p.mesh.Admin()
		if code, body := b.do("POST", "/rollout", move); code != tt.moves && code != http.StatusConflict {
			t.Errorf("%s promotes: %d %s, want %d", tt.name, code, body, tt.moves)
		}
		p.mu.Lock()
		p.late += time.Hour + time.Second
		p.mu.Unlock()
		if code, _ := b.do("GET", "/view/denied", ""); code != http.StatusUnauthorized {
			t.Errorf("%s stays: %d", tt.name, code)
		}
	}
	if len(p.mesh.Moves) == 0 {
		t.Error("nobody has promoted anything")
	}
	seen := map[string]bool{}
	p.login.mu.Lock()
	defer p.login.mu.Unlock()
	for _, q := range p.login.asked {
		for _, s := range []string{q.Get("state"), q.Get("nonce"), q.Get("code_challenge")} {
			if seen[s] {
				t.Error("a state, nonce or challenge comes twice")
			}
			seen[s] = true
		}
	}
}

func TestWhoIsNotLetInByAProvider(t *testing.T) {
	p := openPorch(t)
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	claim := func(name string, value any) func(*jwt.Token) any {
		return func(tok *jwt.Token) any { tok.Claims.(jwt.MapClaims)[name] = value; return p.login.key }
	}
	staff := jwt.MapClaims{"groups": "staff"}
	for name, tt := range map[string]struct {
		user  jwt.MapClaims
		spoil func(*jwt.Token) any
	}{
		"of no group":               {jwt.MapClaims{"groups": []string{"x"}}, nil},
		"without groups":            {nil, nil},
		"with groups that are none": {jwt.MapClaims{"groups": map[string]any{"staff": true}}, nil},
		"with another nonce":        {staff, claim("nonce", "x")},
		"without a nonce":           {staff, claim("nonce", nil)},
		"for another client":        {staff, claim("aud", "x")},
		"for others too":            {staff, claim("aud", []string{oidcClient, "x"})},
		"of another party":          {staff, claim("azp", "x")},
		"of another issuer":         {staff, claim("iss", "https://evil.test")},
		"that is over":              {staff, claim("exp", time.Now().Add(-time.Minute).Unix())},
		"without an age":            {staff, claim("iat", nil)},
		"without a subject":         {staff, claim("sub", "")},
		"by another key":            {staff, func(*jwt.Token) any { return other }},
		"by a key nobody publishes": {staff, func(tok *jwt.Token) any { tok.Header["kid"] = "k2"; return other }},
		"by no key": {staff, func(tok *jwt.Token) any {
			tok.Method, tok.Header["alg"] = jwt.SigningMethodNone, "none"
			return jwt.UnsafeAllowNoneSignatureType
		}},
		"by a secret": {staff, func(tok *jwt.Token) any {
			tok.Method, tok.Header["alg"] = jwt.SigningMethodHS256, "HS256"
			return []byte(oidcSecret)
		}},
		"of another kind": {staff, func(tok *jwt.Token) any { tok.Header["typ"] = "at+jwt"; return p.login.key }},
	} {
		p.login.next(tt.user, tt.spoil)
		if code, body := p.browser().signIn(); code != http.StatusForbidden && code != http.StatusBadGateway {
			t.Errorf("a token %s: %d %s", name, code, body)
		}
	}
	for _, c := range p.mesh.Calls {
		if c.Allowed {
			t.Errorf("recorded %+v", c)
		}
	}
	if n := len(p.mesh.Calls); n == 0 {
		t.Error("nobody who was refused is on record")
	}
}

// TestASignInIsOfOneBrowser has the provider's answer come to another browser, or
// changed on the way.
func TestASignInIsOfOneBrowser(t *testing.T) {
	p := openPorch(t)
	p.login.next(jwt.MapClaims{"groups": "staff"}, nil)
	for name, change := range map[string]func(b *browser, q url.Values) *browser{
		"another browser":              func(*browser, url.Values) *browser { return p.browser() },
		"another browser in a sign-in": func(*browser, url.Values) *browser { b := p.browser(); b.begin(); return b },
		"another state":                func(b *browser, q url.Values) *browser { q.Set("state", q.Get("state")+"x"); return b },
		"no state":                     func(b *browser, q url.Values) *browser { q.Del("state"); return b },
		"another provider":             func(b *browser, q url.Values) *browser { q.Set("iss", "https://evil.test"); return b },
		"another code":                 func(b *browser, q url.Values) *browser { q.Set("code", "x"); return b },
		"no code":                      func(b *browser, q url.Values) *browser { q.Del("code"); return b },
		"a refusal":                    func(b *browser, q url.Values) *browser { q.Set("error", "access_denied"); return b },
		"too late": func(b *browser, _ url.Values) *browser {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.late += 11 * time.Minute
			return b
		},
	} {
		b := p.browser()
		u, err := url.Parse(b.begin())
		if err != nil {
			t.Fatal(err)
		}
		q := u.Query()
		who := change(b, q)
		u.RawQuery = q.Encode()
		if code, body := who.do("GET", u.String(), ""); code != http.StatusForbidden && code != http.StatusBadGateway {
			t.Errorf("%s: %d %s", name, code, body)
		}
	}
	b := p.browser()
	back := b.begin()
	if code, _ := b.do("GET", back, ""); code != http.StatusOK {
		t.Errorf("unchanged: %d", code)
	}
	if code, _ := b.do("GET", back, ""); code != http.StatusForbidden {
		t.Errorf("the provider's answer is good twice: %d", code)
	}
}

// TestATokenIsOfOneBrowser has the address at the end of a sign-in come to another
// browser, which it opens nothing for; nor for the right one afterwards.
func TestATokenIsOfOneBrowser(t *testing.T) {
	p := openPorch(t)
	p.login.next(jwt.MapClaims{"groups": "staff"}, nil)
	b, other := p.browser(), p.browser()
	if code, who := other.signIn(); code != http.StatusOK { // which has a cookie of its own then
		t.Fatalf("%d %s", code, who)
	}
	for _, thief := range []*browser{p.browser(), other} {
		_, token := b.do("GET", "/oidc/signin", "")
		for _, who := range []*browser{thief, b} {
			if code, body := who.do("POST", "/session", `{"token":"`+token+`"}`); code != http.StatusForbidden {
				t.Errorf("a token opens the page for another browser: %d %s", code, body)
			}
		}
	}
	if code, who := b.signIn(); code != http.StatusOK {
		t.Errorf("afterwards nobody enters: %d %s", code, who)
	}
}

// TestAPersonHasFewSessions shows that who signs in again and again ends his own
// sessions, and no others.
func TestAPersonHasFewSessions(t *testing.T) {
	p := openPorch(t)
	enter := func(sub string) *browser {
		p.login.next(jwt.MapClaims{"groups": "staff", "sub": sub}, nil)
		b := p.browser()
		if code, who := b.signIn(); code != http.StatusOK {
			t.Fatalf("%d %s", code, who)
		}
		p.mu.Lock()
		p.late += time.Second // so that one session is older than the other
		p.mu.Unlock()
		return b
	}
	bob := enter("bob")
	var all []*browser
	for range 10 {
		all = append(all, enter("alice"))
	}
	for i, b := range all {
		want := http.StatusOK
		if i < 2 {
			want = http.StatusUnauthorized
		}
		if code, _ := b.do("GET", "/view/denied", ""); code != want {
			t.Errorf("session %d of 10: %d, want %d", i, code, want)
		}
	}
	if code, _ := bob.do("GET", "/view/denied", ""); code != http.StatusOK {
		t.Errorf("another's session: %d", code)
	}
}

// TestVainSignInsEnd shows that who brings one false code after another has the
// provider asked, and the log written to, so many times; others go on signing in.
func TestVainSignInsEnd(t *testing.T) {
	p := openPorch(t)
	p.login.next(jwt.MapClaims{"groups": "staff"}, nil)
	vain := 0
	for code := 0; code != http.StatusTooManyRequests; vain++ {
		b := p.browser()
		u, err := url.Parse(b.begin())
		if err != nil {
			t.Fatal(err)
		}
		q := u.Query()
		q.Set("code", "x")
		u.RawQuery = q.Encode()
		if code, _ = b.do("GET", u.String(), ""); code != http.StatusBadGateway && code != http.StatusTooManyRequests || vain > 100 {
			t.Fatalf("the vain sign-in %d: %d", vain, code)
		}
	}
	if n := p.told.Load(); n != 1 {
		t.Errorf("%d lines in the log of %d vain sign-ins", n, vain)
	}
	b := p.browser()
	from := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	elsewhere := b.c.Transport.(*http.Transport).Clone()
	elsewhere.DialContext = from.DialContext
	b.c.Transport = elsewhere
	defer elsewhere.CloseIdleConnections()
	if code, who := b.signIn(); code != http.StatusOK {
		t.Errorf("from another address: %d %s", code, who)
	}
}

// begin begins a sign-in, and returns where the provider sends the browser.
func (b *browser) begin() (back string) {
	b.p.t.Helper()
	stop := *b.c
	stop.CheckRedirect = func(req *http.Request, _ []*http.Request) error {
		if req.URL.Path == "/oidc/callback" {
			back = req.URL.String()
			return http.ErrUseLastResponse
		}
		return nil
	}
	resp, err := stop.Get(b.p.url + "/oidc/signin")
	if err != nil {
		b.p.t.Fatal(err)
	}
	resp.Body.Close()
	if back == "" {
		b.p.t.Fatalf("the provider sends nobody back: %s", resp.Status)
	}
	return back
}

func TestOIDCValidate(t *testing.T) {
	good := page.OIDC{Issuer: "https://login.example", Client: "c", URL: "https://page.example:7070", Viewers: []string{"v"}}
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	for field, change := range map[string]func(*page.OIDC){
		"issuer:":  func(o *page.OIDC) { o.Issuer = "http://login.example" },
		"url:":     func(o *page.OIDC) { o.URL = "https://page.example/sub" },
		"client:":  func(o *page.OIDC) { o.Client = "" },
		"viewers:": func(o *page.OIDC) { o.Viewers = nil },
		"ca:":      func(o *page.OIDC) { o.CA = "x" },
	} {
		o := good
		change(&o)
		if err := o.Validate(); err == nil || !strings.HasPrefix(err.Error(), field) {
			t.Errorf("%s %v", field, err)
		}
	}
}
