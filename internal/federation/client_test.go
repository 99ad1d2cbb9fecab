package federation

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/meshtest"
	"sallyport/internal/svid"
)

var quiet = slog.New(slog.DiscardHandler)

// A site is a trust domain with a bundle endpoint of the profile https_spiffe.
type site struct {
	td  spiffeid.TrustDomain
	ca  *meshtest.CA
	url string
	doc atomic.Pointer[Bundle]
	// identity that the endpoint proves; a test may change it.
	identity atomic.Pointer[svid.Identity]
	asked    atomic.Int64
}

func (s *site) id() spiffeid.ID { return spiffeid.RequireFromPath(s.td, "/spire/server") }

func (s *site) prove(t *testing.T, ca *meshtest.CA, id spiffeid.ID) {
	i := meshtest.Identity(t, ca, id)
	s.identity.Store(&i)
}

func newSite(t *testing.T, td spiffeid.TrustDomain) *site {
	t.Helper()
	b, ca := bundleOf(t, td)
	s := &site{td: td, ca: ca}
	s.doc.Store(b)
	s.prove(t, ca, s.id())
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h := BundleHandler(s.doc.Load, quiet)
	srv := NewHTTPServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.asked.Add(1); h.ServeHTTP(w, r) }),
		func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			i := s.identity.Load()
			c := &tls.Certificate{PrivateKey: i.Key}
			for _, x := range i.Chain {
				c.Certificate = append(c.Certificate, x.Raw)
			}
			return c, nil
		}, quiet)
	go srv.ServeTLS(ln, "", "")
	t.Cleanup(func() { srv.Close() })
	s.url = "https://" + ln.Addr().String()
	return s
}

// relationship is how others follow the site.
func (s *site) relationship() Relationship {
	return Relationship{TrustDomain: s.td, URL: s.url, Profile: ProfileSPIFFE, EndpointID: s.id()}
}

func follower(t *testing.T, change func(*FollowerConfig), rs ...Relationship) *Follower {
	t.Helper()
	cfg := FollowerConfig{Relationships: rs, Own: near, OwnBundle: func() *x509bundle.Bundle { return x509bundle.New(near) }, Log: quiet}
	if change != nil {
		change(&cfg)
	}
	f, err := NewFollower(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func start(bs ...*Bundle) func(*FollowerConfig) {
	return func(c *FollowerConfig) {
		c.Start = map[spiffeid.TrustDomain]*Bundle{}
		for _, b := range bs {
			c.Start[b.TrustDomain] = b
		}
	}
}

func TestSelfServingEndpointIsVerifiedWithItsLatestBundle(t *testing.T) {
	s := newSite(t, far)
	first := s.doc.Load()
	saved := map[spiffeid.TrustDomain][]byte{}
	f := follower(t, func(c *FollowerConfig) {
		start(first)(c)
		c.Save = func(td spiffeid.TrustDomain, doc []byte) error { saved[td] = doc; return nil }
	}, s.relationship())
	changed := f.Changed()
	if err := f.Refresh(t.Context(), s.relationship()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
		t.Error("an unchanged bundle counts as a change")
	default:
	}
	// 81: the next root is published, then used.
	next, ca2 := bundleOf(t, far)
	next.X509, next.Sequence = append(next.X509, first.X509...), first.Sequence+1
	s.doc.Store(next)
	if err := f.Refresh(t.Context(), s.relationship()); err != nil {
		t.Fatal(err)
	}
	<-changed
	if got := f.Bundle(far); len(got.X509) != 2 || saved[far] == nil {
		t.Errorf("kept %d authorities, saved %d bytes", len(got.X509), len(saved[far]))
	}
	s.prove(t, ca2, s.id()) // 94: only the latest bundle verifies this
	if err := f.Refresh(t.Context(), s.relationship()); err != nil {
		t.Errorf("after the root rotated: %v", err)
	}
	// A document from the past is refused, and what is known stays.
	s.doc.Store(first)
	if err := f.Refresh(t.Context(), s.relationship()); err == nil || !strings.Contains(err.Error(), "sequence 7 is lower than 8") {
		t.Errorf("played back: %v", err)
	}
	if got := f.Bundle(far); len(got.X509) != 2 {
		t.Errorf("after the playback %d authorities", len(got.X509))
	}
	// 77: a document without keys trusts nobody, and is taken at its word.
	s.doc.Store(&Bundle{TrustDomain: far, Sequence: 9})
	if err := f.Refresh(t.Context(), s.relationship()); err != nil || !f.Bundle(far).X509Bundle().Empty() {
		t.Errorf("emptied: %v, %v", f.Bundle(far), err)
	}
}

func TestEndpointMustProveExactlyItsIdentity(t *testing.T) {
	other := newSite(t, spiffeid.RequireTrustDomainFromString("other.example"))
	for name, tt := range map[string]struct {
		prove func(*testing.T, *site)
		say   string
	}{
		"another identity":     {func(t *testing.T, s *site) { s.prove(t, s.ca, spiffeid.RequireFromPath(far, "/w")) }, "want spiffe://far.example/spire/server"},
		"another trust domain": {func(t *testing.T, s *site) { s.prove(t, other.ca, other.id()) }, "trust domain is not far.example"},
		"another authority":    {func(t *testing.T, s *site) { s.prove(t, meshtest.NewCA(t, far), s.id()) }, "unknown authority"},
		"an expired SVID": {func(t *testing.T, s *site) {
			i := s.ca.Issue(t, s.id(), -time.Second)
			s.identity.Store(&i)
		}, "expired"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, far)
			f := follower(t, start(s.doc.Load()), s.relationship())
			tt.prove(t, s)
			if err := f.Refresh(t.Context(), s.relationship()); err == nil || !strings.Contains(err.Error(), tt.say) {
				t.Errorf("got %v, want an error that says %q", err, tt.say)
			}
			if s.asked.Load() != 0 {
				t.Error("a request was sent to an endpoint that proved nothing")
			}
		})
	}
}

func TestEndpointOfAThirdTrustDomain(t *testing.T) {
	host := newSite(t, spiffeid.RequireTrustDomainFromString("host.example"))
	farBundle, _ := bundleOf(t, far)
	host.doc.Store(farBundle) // 95: it serves the bundle of another
	r := Relationship{TrustDomain: far, URL: host.url, Profile: ProfileSPIFFE, EndpointID: host.id()}
	hostBundle := &Bundle{TrustDomain: host.td, X509: host.ca.Bundle().X509Authorities()}
	f := follower(t, start(hostBundle), host.relationship(), r)
	if err := f.Refresh(t.Context(), r); err != nil || len(f.Bundle(far).X509) != 1 {
		t.Fatal(err)
	}
	if f.Bundle(far).X509[0].Equal(f.Bundle(host.td).X509[0]) {
		t.Error("82: the bundles of two trust domains were mixed")
	}
	// Without configuration of its trust domain the endpoint means nothing.
	_, err := NewFollower(FollowerConfig{Relationships: []Relationship{r}, Own: near, OwnBundle: func() *x509bundle.Bundle { return nil }, Log: quiet})
	if err == nil || !strings.Contains(err.Error(), "host.example, which is not federated") {
		t.Errorf("got %v", err)
	}
}

func TestWebEndpoint(t *testing.T) {
	b, _ := bundleOf(t, far)
	srv := httptest.NewTLSServer(BundleHandler(func() *Bundle { return b }, quiet))
	defer srv.Close()
	pool := x509.NewCertPool()
	pool.AddCert(srv.Certificate())
	r := Relationship{TrustDomain: far, URL: srv.URL, Profile: ProfileWeb}
	f := follower(t, func(c *FollowerConfig) { c.WebRoots = pool }, r)
	if err := f.Refresh(t.Context(), r); err != nil || f.Bundle(far) == nil {
		t.Fatal(err)
	}
	// 88: the host must be a name of the certificate.
	r.URL = strings.Replace(srv.URL, "127.0.0.1", "localhost", 1)
	if err := f.Refresh(t.Context(), r); err == nil || !strings.Contains(err.Error(), "localhost") {
		t.Errorf("another host: %v", err)
	}
	// Who nobody vouches for is not believed.
	r.URL = srv.URL
	f = follower(t, func(c *FollowerConfig) { c.WebRoots = x509.NewCertPool() }, r)
	if err := f.Refresh(t.Context(), r); err == nil || !strings.Contains(err.Error(), "unknown authority") {
		t.Errorf("an unknown authority: %v", err)
	}
}

func TestRedirects(t *testing.T) {
	s := newSite(t, far)
	var to atomic.Pointer[string]
	front := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, *to.Load(), http.StatusFound)
	}))
	defer front.Close()
	pool := x509.NewCertPool()
	pool.AddCert(front.Certificate())
	for target, say := range map[string]string{
		s.url:                   "certificate",      // 91: the same checks hold there, and it has no web certificate
		"http://127.0.0.1:1":    "not an https URL", // 87
		"https://u:p@127.0.0.1": "user information", // 87
		front.URL + "/round":    "more than 3 redirects",
	} {
		to.Store(&target)
		r := Relationship{TrustDomain: far, URL: front.URL, Profile: ProfileWeb}
		f := follower(t, func(c *FollowerConfig) { c.WebRoots = pool }, r)
		if err := f.Refresh(t.Context(), r); err == nil || !strings.Contains(err.Error(), say) {
			t.Errorf("%s: %v, want an error that says %q", target, err, say)
		}
	}
	if s.asked.Load() != 0 {
		t.Error("a redirect led to an endpoint that was not verified")
	}
}

func TestBadAnswersKeepWhatIsKnown(t *testing.T) {
	b, _ := bundleOf(t, far)
	for name, h := range map[string]http.HandlerFunc{
		"an error":       func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) },
		"nothing":        func(http.ResponseWriter, *http.Request) {},
		"no document":    func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "<html>") },
		"far too much":   func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, strings.Repeat(" ", MaxDocument+2)) },
		"a dropped line": func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
	} {
		srv := httptest.NewTLSServer(h)
		pool := x509.NewCertPool()
		pool.AddCert(srv.Certificate())
		r := Relationship{TrustDomain: far, URL: srv.URL, Profile: ProfileWeb}
		f := follower(t, func(c *FollowerConfig) { start(b)(c); c.WebRoots = pool }, r)
		if err := f.Refresh(t.Context(), r); err == nil || f.Bundle(far) != b {
			t.Errorf("%s: %v", name, err)
		}
		srv.Close()
	}
}

func TestFollowerTellsOfEachLook(t *testing.T) {
	s := newSite(t, far)
	type look struct {
		good time.Time
		err  error
	}
	looks := make(chan look, 1)
	f := follower(t, func(c *FollowerConfig) {
		start(s.doc.Load())(c)
		c.OnFetch = func(_ spiffeid.TrustDomain, good time.Time, err error) { looks <- look{good, err} }
	}, s.relationship())
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- f.Run(ctx) }()
	if l := <-looks; l.err != nil || l.good.IsZero() {
		t.Errorf("first look: %+v", l)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestPause(t *testing.T) {
	f := follower(t, start(&Bundle{TrustDomain: far}), Relationship{TrustDomain: far, URL: "https://far.example", Profile: ProfileWeb})
	for _, tt := range []struct {
		hint     time.Duration
		failures int
		lo, hi   time.Duration
	}{
		{0, 0, 270 * time.Second, 5 * time.Minute},
		{time.Second, 0, time.Minute, 66 * time.Second},
		{10 * time.Minute, 0, 9 * time.Minute, 10 * time.Minute},
		{maxHint, 0, maxRefresh * 9 / 10, maxRefresh},
		{10 * time.Minute, 3, time.Minute, 66 * time.Second},
	} {
		f.held[far] = &Bundle{TrustDomain: far, RefreshHint: tt.hint}
		for range 50 {
			if d := f.pause(far, tt.failures); d < tt.lo || d > tt.hi {
				t.Fatalf("hint %s, %d failures: %s, want %s to %s", tt.hint, tt.failures, d, tt.lo, tt.hi)
			}
		}
	}
	delete(f.held, far)
	if d := f.pause(far, 1); d > 5*time.Second {
		t.Errorf("without any bundle: %s", d)
	}
}

func TestRelationshipValidate(t *testing.T) {
	id := spiffeid.RequireFromPath(far, "/spire/server")
	for name, tt := range map[string]struct {
		r   Relationship
		say string
	}{
		"87 http":           {Relationship{far, "http://far.example", ProfileWeb, spiffeid.ID{}}, "https"},
		"87 user":           {Relationship{far, "https://u@far.example", ProfileWeb, spiffeid.ID{}}, "user information"},
		"85 no profile":     {Relationship{far, "https://far.example", "", spiffeid.ID{}}, "profile"},
		"85 no domain":      {Relationship{spiffeid.TrustDomain{}, "https://far.example", ProfileWeb, spiffeid.ID{}}, "trust_domain"},
		"92 no endpoint ID": {Relationship{far, "https://far.example", ProfileSPIFFE, spiffeid.ID{}}, "endpoint_spiffe_id"},
		"88 one too many":   {Relationship{far, "https://far.example", ProfileWeb, id}, "no meaning"},
		"a trust domain":    {Relationship{far, "https://far.example", ProfileSPIFFE, far.ID()}, "names a trust domain"},
	} {
		if err := tt.r.Validate(); err == nil || !strings.Contains(err.Error(), tt.say) {
			t.Errorf("%s: %v, want an error that says %q", name, err, tt.say)
		}
	}
	own := Relationship{near, "https://near.example", ProfileWeb, spiffeid.ID{}}
	twice := Relationship{far, "https://far.example", ProfileWeb, spiffeid.ID{}}
	first := Relationship{far, "https://far.example", ProfileSPIFFE, id}
	for say, rs := range map[string][]Relationship{"is this trust domain": {own}, "stands twice": {twice, twice}, "bundle: missing": {first}} {
		_, err := NewFollower(FollowerConfig{Relationships: rs, Own: near, OwnBundle: func() *x509bundle.Bundle { return nil }, Log: quiet})
		if err == nil || !strings.Contains(err.Error(), say) {
			t.Errorf("got %v, want an error that says %q", err, say)
		}
	}
}

func TestPublishedDocuments(t *testing.T) {
	b, _ := bundleOf(t, far)
	var broken atomic.Bool
	bundle := func() *Bundle {
		if broken.Load() {
			return nil
		}
		return b
	}
	oidc, err := OIDCHandler("https://oidc.far.example/td", bundle, quiet)
	if err != nil {
		t.Fatal(err)
	}
	for path, h := range map[string]http.Handler{"/": BundleHandler(bundle, quiet), "/td/keys": oidc, "/td/.well-known/openid-configuration": oidc} {
		get := func(method, etag string) *http.Response {
			r := httptest.NewRequest(method, path, nil)
			if etag != "" {
				r.Header.Set("If-None-Match", etag)
			}
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			return w.Result()
		}
		r := get("GET", "")
		if r.StatusCode != 200 || r.Header.Get("Content-Type") != "application/json" || !strings.HasPrefix(r.Header.Get("Cache-Control"), "public, max-age=") {
			t.Errorf("%s: %s, %v", path, r.Status, r.Header)
		}
		if n := get("GET", r.Header.Get("ETag")); n.StatusCode != http.StatusNotModified {
			t.Errorf("%s with its validator: %s", path, n.Status)
		}
		if n := get("HEAD", ""); n.StatusCode != 200 {
			t.Errorf("%s HEAD: %s", path, n.Status)
		}
		if n := get("POST", ""); n.StatusCode != http.StatusMethodNotAllowed || n.Header.Get("Allow") != "GET, HEAD" {
			t.Errorf("%s POST: %s", path, n.Status)
		}
		if path != "/td/.well-known/openid-configuration" {
			broken.Store(true)
			if n := get("GET", ""); n.StatusCode != http.StatusServiceUnavailable || n.Header.Get("Cache-Control") != "no-store" {
				t.Errorf("%s without a bundle: %s %v", path, n.Status, n.Header)
			}
			broken.Store(false)
		}
	}
}

func TestCheckIssuer(t *testing.T) {
	for _, good := range []string{"https://oidc.example", "https://oidc.example:8444", "https://oidc.example/a/b"} {
		if err := CheckIssuer(good); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
	for _, bad := range []string{"", "oidc.example", "http://oidc.example", "https://", "https://u@oidc.example", "https://oidc.example/", "https://oidc.example?", "https://oidc.example?a=b", "https://oidc.example#", "https://oidc.example#x", "https://oidc.example/ä"} {
		if err := CheckIssuer(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
	if _, err := OIDCHandler("http://x", nil, quiet); err == nil {
		t.Error("an issuer that is not https was accepted")
	}
}

var errNone = errors.New("none")

func TestServerTLSAsksForNoClientCertificate(t *testing.T) {
	c := ServerTLS(func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return nil, errNone })
	if c.ClientAuth != tls.NoClientCert || c.MinVersion != tls.VersionTLS12 { // 84, 89
		t.Errorf("client auth %v, version %x", c.ClientAuth, c.MinVersion)
	}
}
