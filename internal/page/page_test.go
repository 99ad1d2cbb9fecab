package page_test

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"sallyport/internal/mesh"
	"sallyport/internal/page"
	"sallyport/internal/page/pagetest"
)

// A site is a page on a loopback listener, and one who looks at it.
type site struct {
	t       *testing.T
	mesh    *pagetest.Mesh
	page    *page.Page
	url     string
	session string
	csrf    string
}

func open(t *testing.T, n int) *site {
	t.Helper()
	s := &site{t: t, mesh: pagetest.New(n, time.Date(2026, 11, 27, 12, 0, 0, 0, time.UTC))}
	srv := httptest.NewUnstartedServer(nil)
	conf := s.mesh.Config()
	conf.Loopback = srv.Listener.Addr().String()
	var err error
	if s.page, err = page.New(conf); err != nil {
		t.Fatal(err)
	}
	srv.Config.Handler = s.page.Handler()
	srv.Start()
	t.Cleanup(srv.Close)
	s.url = srv.URL
	return s
}

// do sends a request as the page's script does.
func (s *site) do(method, path, body string, change ...func(*http.Request)) (int, string) {
	s.t.Helper()
	req, err := http.NewRequestWithContext(s.t.Context(), method, s.url+path, strings.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	if method != http.MethodGet {
		req.Header.Set("Origin", s.url)
	}
	if s.session != "" {
		req.Header.Set("Authorization", "Bearer "+s.session)
		req.Header.Set("Sallyport-Csrf", s.csrf)
	}
	for _, f := range change {
		f(req)
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// link is the token of a new link.
func (s *site) link() string {
	s.t.Helper()
	link, _, err := s.page.NewLink(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	u, err := url.Parse(link)
	if err != nil || !strings.HasPrefix(link, s.url+"/denied#") {
		s.t.Fatalf("link %q, %v", link, err)
	}
	return u.Fragment
}

func (s *site) enter() *site {
	s.t.Helper()
	code, body := s.do("POST", "/session", `{"token":"`+s.link()+`"}`)
	var got struct{ Session, Csrf string }
	if err := json.Unmarshal([]byte(body), &got); code != 200 || err != nil || got.Session == "" || got.Csrf == "" {
		s.t.Fatalf("entered: %d %s", code, body)
	}
	s.session, s.csrf = got.Session, got.Csrf
	return s
}

func TestAViewShowsWhatThereIs(t *testing.T) {
	s := open(t, 30).enter()
	end := url.QueryEscape(pagetest.ID(0))
	for path, want := range map[string][]string{
		"/denied":                    {"Denied now", "/v1/charges/c-100", "p, new-1, in, spiffe://corp.example/ns/pay/sa/cart", "does not fit", "guard-admin"},
		"/denied?find=admin":         {"/admin/export"},
		"/map":                       {"api.stripe.test", "nobody", "<svg", "Tried and denied"},
		"/map?show=unused":           {"row-3-2"},
		"/map?show=denied":           {"refused"},
		"/map?focus=api.stripe.test": {"from and to"},
		"/map?focus=nobody-at-all":   {"Nobody here has the one name"},
		"/map?group=ns":              {"shop"},
		"/map?than=24h":              {"Since 24h before", "new"},
		"/services":                  {"shop-cart", "SYNCED", "STALE"},
		"/service?end=" + end:        {"Callers", "Called by it", "10.4.0.17:15006", "by 1 of 29 sidecars", "Calls over time"},
		"/rollouts":                  {"v2", "Promote", "Abort", "rolled back"},
		"/egress":                    {"evil.test", "1.3 MiB", "Held off by gateways", "bank.example", "by 1 of 1 gateways", "5 consecutive failures"},
		"/egress?find=evil":          {"evil.test"},
		"/audit":                     {"does not continue", "unbroken", "k3v9q2-4410"},
		"/audit?decision=allow":      {"No record fits"},
		"/ca":                        {"37 of 40", "activate", "prepared"},
		"/doctor":                    {"SP002", "SP011", "SP013", "UP004", "v1.3.2 go1.26.4", "another", "5</b> findings"},
	} {
		code, body := s.do("GET", "/view"+path, "")
		if code != 200 {
			t.Errorf("%s: %d %s", path, code, body)
		}
		for _, w := range want {
			if !strings.Contains(body, w) {
				t.Errorf("%s says nothing of %q", path, w)
			}
		}
		if strings.Contains(body, "style=") || strings.Contains(body, "onclick") || strings.Contains(body, "ZgotmplZ") {
			t.Errorf("%s has what its policy of content forbids", path)
		}
	}
	for _, path := range []string{"/map?span=2y", "/map?show=some", "/map?from=-1", "/map?than=x", "/audit?decision=maybe", "/service"} {
		if code, body := s.do("GET", "/view"+path, ""); code != 400 {
			t.Errorf("%s: %d %s, want 400", path, code, body)
		}
	}
}

// TestALargeMeshIsDrawnSmall shows that no drawing has more nodes than people
// can read, and that a table is a page of rows.
func TestALargeMeshIsDrawnSmall(t *testing.T) {
	s := open(t, 1000).enter()
	for _, path := range []string{"/map", "/map?span=30d", "/map?show=unused"} {
		_, body := s.do("GET", "/view"+path, "")
		if n := strings.Count(body, "<rect"); n == 0 || n > 150 {
			t.Errorf("%s draws %d nodes", path, n)
		}
		if n := strings.Count(body, "<tr"); n > 101 {
			t.Errorf("%s has %d rows", path, n)
		}
		if len(body) > 300<<10 {
			t.Errorf("%s has %d KiB", path, len(body)>>10)
		}
	}
}

func TestALinkOpensThePageOnce(t *testing.T) {
	s := open(t, 5)
	if code, _ := s.do("GET", "/view/denied", ""); code != 401 {
		t.Errorf("a stranger sees the page: %d", code)
	}
	token := s.link()
	body := `{"token":"` + token + `"}`
	if code, _ := s.do("POST", "/session", body, func(r *http.Request) { r.Header.Set("Origin", "http://evil.test") }); code != 403 {
		t.Errorf("another site opens a link: %d", code)
	}
	if code, _ := s.do("POST", "/session", body, func(r *http.Request) { r.Host = "evil.test" }); code != http.StatusMisdirectedRequest {
		t.Errorf("another name leads to the page: %d", code)
	}
	if code, _ := s.do("POST", "/session", body); code != 200 {
		t.Errorf("a link does not open the page: %d", code)
	}
	if code, _ := s.do("POST", "/session", body); code != 403 {
		t.Errorf("a link opens the page twice: %d", code)
	}
	if code, _ := s.do("POST", "/session", `{"token":""}`); code != 403 {
		t.Errorf("no token opens the page: %d", code)
	}
	if n := len(s.mesh.Calls); n != 1 || s.mesh.Calls[0].Method != "page.Enter" {
		t.Errorf("recorded %+v, want one who entered", s.mesh.Calls)
	}
}

// TestAWriteIsCheckedAndRecordedFirst promotes a rollout, and shows what keeps it
// from being promoted.
func TestAWriteIsCheckedAndRecordedFirst(t *testing.T) {
	s := open(t, 30).enter()
	const move = `{"service":"shop-cart","route":"default","move":"promote"}`
	for name, f := range map[string]func(*http.Request){
		"no csrf":             func(r *http.Request) { r.Header.Del("Sallyport-Csrf") },
		"another csrf":        func(r *http.Request) { r.Header.Set("Sallyport-Csrf", strings.Repeat("0", 64)) },
		"another origin":      func(r *http.Request) { r.Header.Set("Origin", "http://evil.test") },
		"no origin":           func(r *http.Request) { r.Header.Del("Origin") },
		"another site":        func(r *http.Request) { r.Header.Set("Sec-Fetch-Site", "cross-site") },
		"a session of nobody": func(r *http.Request) { r.Header.Set("Authorization", "Bearer x") },
		"no session":          func(r *http.Request) { r.Header.Del("Authorization") },
		"another move": func(r *http.Request) {
			r.Body = io.NopCloser(strings.NewReader(`{"service":"a","route":"b","move":"start"}`))
			r.ContentLength = -1
		},
		"a field nobody knows": func(r *http.Request) {
			r.Body = io.NopCloser(strings.NewReader(`{"service":"a","route":"b","move":"abort","force":true}`))
			r.ContentLength = -1
		},
	} {
		if code, body := s.do("POST", "/rollout", move, f); code < 400 || code >= 500 {
			t.Errorf("%s: %d %s", name, code, body)
		}
	}
	s.mesh.Refuse = errors.New("disk full")
	if code, _ := s.do("POST", "/rollout", move); code != 503 {
		t.Errorf("what cannot be recorded: %d, want 503", code)
	}
	s.mesh.Refuse = nil
	s.mesh.Admin(mesh.AdminRule{ID: "no-1", Caller: mesh.AdminLocal, Method: "page.MoveRollout", On: mesh.Any, Effect: mesh.Deny})
	if code, body := s.do("POST", "/rollout", move); code != 403 || !strings.Contains(body, "page.MoveRollout") {
		t.Errorf("who may not: %d %s", code, body)
	}
	if _, body := s.do("GET", "/view/rollouts", ""); strings.Contains(body, "Promote") {
		t.Error("the page offers what may not be done")
	}
	s.mesh.Admin(mesh.AdminRule{ID: "no-2", Caller: mesh.AdminLocal, Method: "mesh.MoveRollout", On: mesh.Any, Effect: mesh.Deny})
	if code, body := s.do("POST", "/rollout", move); code != 403 {
		t.Errorf("who may not by a call either: %d %s", code, body)
	}
	if len(s.mesh.Moves) > 0 {
		t.Fatalf("moved %+v", s.mesh.Moves)
	}
	s.mesh.Admin()
	if code, body := s.do("POST", "/rollout", move); code != 204 || len(s.mesh.Moves) != 1 || s.mesh.Moves[0].By != "local" {
		t.Errorf("promote: %d %s, %+v", code, body, s.mesh.Moves)
	}
	if c := s.mesh.Calls[len(s.mesh.Calls)-1]; c.Method != "page.MoveRollout" || !c.Allowed {
		t.Errorf("recorded %+v", c)
	}
	if code, _ := s.do("POST", "/rollout", `{"service":"pay-cart","route":"default","move":"abort"}`); code != 409 {
		t.Errorf("abort of what is over: %d, want 409", code)
	}
}

// TestAnIdentityNeedsARow looks at the page by mutual TLS.
func TestAnIdentityNeedsARow(t *testing.T) {
	m := pagetest.New(30, time.Now())
	conf := m.Config()
	revoked := ""
	conf.Revoked = func(serial string) bool { return serial == revoked }
	p, err := page.New(conf)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := p.NewLink(t.Context()); err == nil {
		t.Error("a page that is not of this machine alone has a link")
	}
	const ops = "spiffe://corp.example/ns/ops/sa/oncall"
	ask := func(method, path, id, csrf, body string, change ...func(*x509.Certificate)) (int, string) {
		r := httptest.NewRequest(method, "https://page.corp.example"+path, strings.NewReader(body))
		if id != "" {
			u, err := url.Parse(id)
			if err != nil {
				t.Fatal(err)
			}
			leaf := &x509.Certificate{URIs: []*url.URL{u}, SerialNumber: big.NewInt(7), NotAfter: time.Now().Add(time.Hour)}
			for _, f := range change {
				f(leaf)
			}
			r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf}}
		}
		if method == "POST" {
			r.Header.Set("Origin", "https://page.corp.example")
			r.Header.Set("Sallyport-Csrf", csrf)
		}
		w := httptest.NewRecorder()
		p.Handler().ServeHTTP(w, r)
		return w.Code, w.Body.String()
	}
	if code, _ := ask("GET", "/view/denied", "", "", ""); code != 401 {
		t.Errorf("without a certificate: %d", code)
	}
	for range 3 {
		if code, body := ask("GET", "/view/denied", ops, "", ""); code != 403 || !strings.Contains(body, "page.View") {
			t.Errorf("without a row: %d %s", code, body)
		}
	}
	if n := len(m.Calls); n != 1 || m.Calls[0].Allowed {
		t.Errorf("%d refusals are recorded, want one a minute", n)
	}
	m.Admin(mesh.AdminRule{ID: "see", Caller: "spiffe://corp.example/ns/ops/**", Method: "page.View", On: mesh.Any, Effect: mesh.Allow})
	m.Refuse = errors.New("disk full")
	if code, _ := ask("GET", "/view/denied", ops, "", ""); code != 503 {
		t.Errorf("a viewer who cannot be recorded: %d, want 503", code)
	}
	m.Refuse = nil
	for range 3 {
		if code, _ := ask("GET", "/view/denied", ops, "", ""); code != 200 {
			t.Errorf("a viewer: %d", code)
		}
	}
	if n := len(m.Calls); n != 2 || !m.Calls[1].Allowed || m.Calls[1].Method != "page.Enter" || m.Calls[1].Rule != "see" {
		t.Errorf("calls on record: %+v, want one refused and one who entered", m.Calls)
	}
	for name, f := range map[string]func(*x509.Certificate){
		"expired":          func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Hour) },
		"of another trust": func(c *x509.Certificate) { c.URIs[0].Host = "other.example" },
		"of two names":     func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) },
		"revoked":          func(c *x509.Certificate) { revoked = "7" },
	} {
		if code, _ := ask("GET", "/view/denied", ops, "", "", f); code != 401 {
			t.Errorf("a certificate that is %s: %d, want 401", name, code)
		}
		revoked = ""
	}
	_, body := ask("GET", "/session", ops, "", "")
	var got struct{ Csrf string }
	if err := json.Unmarshal([]byte(body), &got); err != nil {
		t.Fatal(err)
	}
	const move = `{"service":"shop-cart","route":"default","move":"abort"}`
	if code, _ := ask("POST", "/rollout", ops, got.Csrf, move); code != 403 || len(m.Moves) > 0 {
		t.Errorf("a viewer aborts: %d", code)
	}
	m.Admin(mesh.AdminRule{ID: "run", Caller: ops, Method: "page.*", On: mesh.Any, Effect: mesh.Allow})
	if code, _ := ask("POST", "/rollout", ops, strings.Repeat("0", 64), move); code != 403 || len(m.Moves) > 0 {
		t.Errorf("another site has an operator abort: %d", code)
	}
	if code, body := ask("POST", "/rollout", ops, got.Csrf, move); code != 204 || len(m.Moves) != 1 || m.Moves[0].By != ops {
		t.Errorf("an operator aborts: %d %s %+v", code, body, m.Moves)
	}
	if code, _ := ask("POST", "/session", ops, "", `{"token":"x"}`); code != 400 {
		t.Errorf("a token by mutual TLS: %d", code)
	}
}

func TestALiveViewTellsNews(t *testing.T) {
	s := open(t, 30).enter()
	req, err := http.NewRequestWithContext(t.Context(), "GET", s.url+"/live/denied", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+s.session)
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	in := bufio.NewScanner(resp.Body)
	in.Buffer(nil, 1<<20)
	views := 0
	for in.Scan() {
		data, is := strings.CutPrefix(in.Text(), "data: ")
		if !is {
			continue
		}
		var html string
		if err := json.Unmarshal([]byte(data), &html); err != nil {
			t.Fatal(err)
		}
		if views++; views == 1 {
			s.mesh.Deny("/v9/news")
			continue
		}
		if !strings.Contains(html, "/v9/news") {
			t.Error("the news are not told")
		}
		return
	}
	t.Fatalf("the stream ended: %v", in.Err())
}

func TestEveryAnswerIsStrict(t *testing.T) {
	s := open(t, 5)
	for _, path := range []string{"/denied", "/assets/app.js", "/assets/app.css", "/view/denied", "/nowhere"} {
		resp, err := http.Get(s.url + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if csp := resp.Header.Get("Content-Security-Policy"); !strings.HasPrefix(csp, "default-src 'none'") || strings.Contains(csp, "unsafe") {
			t.Errorf("%s: policy of content %q", path, csp)
		}
	}
}

// TestThePageIsSmall holds all that a browser is sent but the views to 150 kB.
func TestThePageIsSmall(t *testing.T) {
	size := int64(0)
	err := fs.WalkDir(os.DirFS("assets"), ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile("assets/" + path)
		size += int64(len(b))
		if bytes.Contains(b, []byte("://")) && !strings.HasSuffix(path, ".svg") && !bytes.Contains(b, []byte("spiffe://")) {
			t.Errorf("%s names another site", path)
		}
		return err
	})
	if err != nil || size > 150_000 {
		t.Errorf("%d bytes, %v", size, err)
	}
	t.Logf("%d bytes", size)
}
