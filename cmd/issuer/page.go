package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/chart"
	"sallyport/internal/daemon"
	"sallyport/internal/federation"
	"sallyport/internal/mesh"
	"sallyport/internal/page"
)

// PageConfig is about the operator's page. Without Listen there is none.
type PageConfig struct {
	// Listen is host:port, by custom port 7070. An address of the loopback, such
	// as 127.0.0.1:7070, serves plain HTTP to who opens a link of "sallyport
	// page". Any other serves HTTPS to who proves an identity of the trust domain
	// by a client certificate, and has a right to page.View by a row of admin.csv.
	Listen string `yaml:"listen"`
	// CertFile and KeyFile (PEM) prove the host of Listen to a browser. Without
	// them the trust domain's own CA vouches for it.
	CertFile string `yaml:"cert_file"`
	KeyFile  string `yaml:"key_file"`
	// OIDC lets people enter by an OpenID provider, beside certificates. Without
	// issuer nobody does. Not on the loopback.
	OIDC PageOIDC `yaml:"oidc"`
}

// PageOIDC is how people enter the page by an OpenID provider.
type PageOIDC struct {
	// Issuer is the provider's https URL, as its tokens name it.
	Issuer string `yaml:"issuer"`
	// URL is where browsers find the page, https://host[:port]. The provider has to
	// know /oidc/callback below it as the redirect URI.
	URL string `yaml:"url"`
	// Client is the page's name at the provider, and SecretFile has what proves it;
	// without one it is a public client, and PKCE alone protects a sign-in.
	Client     string `yaml:"client"`
	SecretFile string `yaml:"secret_file"`
	// Claim of the ID token has a person's groups, a text or a list. Default groups.
	Claim string `yaml:"claim"`
	// Scopes are asked for beside openid.
	Scopes []string `yaml:"scopes"`
	// Viewers, Operators and Admins are the groups with each role. A viewer looks, an
	// operator promotes and aborts rollouts, an admin does all there is. Rows of
	// admin.csv that deny go before them.
	Viewers   []string `yaml:"viewers"`
	Operators []string `yaml:"operators"`
	Admins    []string `yaml:"admins"`
	// CAFile (PEM) is trusted for the provider in place of the system's roots.
	CAFile string `yaml:"ca_file"`
}

// read makes of it what the page takes; nil without an issuer.
func (c PageOIDC) read() (*page.OIDC, error) {
	if c.Issuer == "" {
		return nil, nil
	}
	o := &page.OIDC{
		Issuer: c.Issuer, URL: c.URL, Client: c.Client, Claim: c.Claim, Scopes: c.Scopes,
		Viewers: c.Viewers, Operators: c.Operators, Admins: c.Admins,
	}
	for _, f := range []struct {
		field, name string
		to          *string
	}{{"secret_file", c.SecretFile, &o.Secret}, {"ca_file", c.CAFile, &o.CA}} {
		if f.name == "" {
			continue
		}
		b, err := os.ReadFile(f.name)
		if err != nil {
			return nil, fmt.Errorf("page.oidc.%s: %w", f.field, err)
		}
		if *f.to = strings.TrimSpace(string(b)); *f.to == "" {
			return nil, fmt.Errorf("page.oidc.%s: %s is empty", f.field, f.name)
		}
	}
	return o, nil
}

// loopback says that only this machine reaches the listener.
func (c PageConfig) loopback() bool {
	host, _, err := net.SplitHostPort(c.Listen)
	ip := net.ParseIP(host)
	return err == nil && ip != nil && ip.IsLoopback()
}

func (c PageConfig) validate() error {
	var errs []error
	if (c.CertFile == "") != (c.KeyFile == "") {
		errs = append(errs, errors.New("page.key_file: cert_file and key_file belong together; write both or none"))
	}
	if c.loopback() && c.CertFile != "" {
		errs = append(errs, errors.New("page.cert_file: a page on a loopback address speaks plain HTTP; leave it out, or choose another listen"))
	}
	o := c.OIDC
	if o.Issuer == "" && !reflect.DeepEqual(o, PageOIDC{}) {
		errs = append(errs, errors.New("page.oidc.issuer: missing: the provider's https URL"))
	}
	if o.Issuer != "" {
		if c.loopback() || c.Listen == "" {
			errs = append(errs, errors.New("page.oidc: a page on a loopback address is entered by a link; choose another page.listen"))
		}
		check := page.OIDC{Issuer: o.Issuer, URL: o.URL, Client: o.Client, Viewers: o.Viewers, Operators: o.Operators, Admins: o.Admins}
		if err := check.Validate(); err != nil {
			for line := range strings.SplitSeq(err.Error(), "\n") {
				errs = append(errs, errors.New("page.oidc."+line))
			}
		}
	}
	return errors.Join(errs...)
}

// openPage opens the listener of the page, and makes it.
func (in *issuer) openPage() (d publicDoor, err error) {
	cfg := in.cfg.Page
	ln, err := in.doors.TCP("page.listen", cfg.Listen)
	if err != nil {
		return d, err
	}
	conf := page.Config{
		TrustDomain: in.cfg.TrustDomain, Status: in.registry.Status, Proxies: in.registry.Proxies, Policies: in.registry.Policies,
		Chart: in.charts.Chart, Windows: in.charts.windows, Denials: in.heard.Denials, Passages: in.heard.Passages,
		Rollouts: deliveries{in.rollouts}.Rollouts, MoveRollout: deliveries{in.rollouts}.MoveRollout,
		Roots: in.auth.Roots, Logs: in.logs, Search: in.search, Admins: authz.NewAdmins(in.registry.Policies, in.log), OnAdmin: in.recordAdmin,
		Revoked: func(serial string) bool { return in.registry.Revocations().Has(serial) }, Log: in.log,
		Version: daemon.Version(),
	}
	if cfg.loopback() {
		conf.Loopback = ln.Addr().String()
	}
	d.ln = ln
	if conf.OIDC, err = cfg.OIDC.read(); err == nil {
		in.page, err = page.New(conf)
	}
	if err == nil {
		d.srv, err = in.pageServer()
	}
	if err != nil {
		return d, errors.Join(err, ln.Close())
	}
	return d, nil
}

// pageServer serves the page; without a TLSConfig in clear text.
func (in *issuer) pageServer() (*http.Server, error) {
	cfg := in.cfg.Page
	srv := &http.Server{
		Handler: in.page.Handler(), ErrorLog: slog.NewLogLogger(in.log.Handler(), slog.LevelDebug),
		ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: time.Minute, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
	}
	if cfg.loopback() {
		return srv, nil
	}
	cert, err := in.publicCertificate(cfg.CertFile, cfg.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("page: %w", err)
	}
	base := federation.ServerTLS(cert)
	base.ClientAuth, base.SessionTicketsDisabled = tls.RequireAndVerifyClientCert, true
	if cfg.OIDC.Issuer != "" { // who shows none signs in
		base.ClientAuth = tls.VerifyClientCertIfGiven
	}
	base.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		c := base.Clone() // the roots change
		c.GetConfigForClient = nil
		c.ClientCAs = x509.NewCertPool()
		for _, root := range in.ca.Bundle().X509 {
			c.ClientCAs.AddCert(root)
		}
		return c, nil
	}
	srv.TLSConfig = base
	return srv, nil
}

// link is control.ServerConfig.PageLink; nil when no link opens the page.
func (in *issuer) link() func(context.Context) (string, time.Time, error) {
	if !in.cfg.Page.loopback() {
		return nil
	}
	return func(ctx context.Context) (string, time.Time, error) { return in.page.NewLink(ctx) }
}

// charts knows which pairs the policies allow.
type charts struct {
	in *issuer

	mu    sync.Mutex // guards the fields below
	of    *mesh.Policies
	pairs []mesh.Unused
}

// Chart is control.ServerConfig.Chart.
func (c *charts) Chart(ctx context.Context, from, to time.Time) (mesh.Chart, error) {
	out := mesh.Chart{From: from, To: to}
	var sum mesh.EdgeSum
	err := c.in.registry.EachWindow(ctx, from, to, func(w mesh.Window) {
		if w.From.Before(out.From) { // they are whole, and so begin before
			out.From = w.From
		}
		sum.Add(w)
	})
	if err != nil {
		return mesh.Chart{}, err
	}
	out.Edges = sum.Edges()
	out.Unused = chart.NotCalled(c.allowed(), out.Edges)
	return out, nil
}

// windows have the calls from and to one end alone: what all of them have together may be
// more than there is room for.
func (c *charts) windows(ctx context.Context, from, to time.Time, end string) (out []mesh.Window, err error) {
	err = c.in.registry.EachWindow(ctx, from, to, func(w mesh.Window) {
		all := w.Edges
		w.Edges = nil
		for _, e := range all {
			if e.Dst == end || e.Src == end {
				w.Edges = append(w.Edges, e)
			}
		}
		out = append(out, w)
	})
	return out, err
}

func (c *charts) allowed() []mesh.Unused {
	p := c.in.registry.Policies()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.of != p {
		c.of, c.pairs = p, chart.Pairs(p)
	}
	return c.pairs
}

const (
	// A search reads so much of each kind at most, the newest files first, and
	// finds so many records.
	findMost = 256 << 20
	findTime = 5 * time.Second
	findHits = 200
)

// search finds records of the issuer's own log and of those it received.
func (in *issuer) search(ctx context.Context, f audit.Filter) (out page.Found, err error) {
	select { // one at a time: each reads what the disk gives
	case in.received.searching <- struct{}{}:
		defer func() { <-in.received.searching }()
	case <-ctx.Done():
		return out, ctx.Err()
	}
	ctx, cancel := context.WithTimeout(ctx, findTime)
	defer cancel()
	files, err := in.received.files()
	if err != nil {
		return out, fmt.Errorf("search audit records: %w", err)
	}
	s := &finder{filter: f, left: findMost}
	own, err := audit.Segments(filepath.Join(in.cfg.DataDir, "audit.jsonl"))
	if err != nil {
		return out, fmt.Errorf("search audit records: %w", err)
	}
	slices.Reverse(own)
	for _, name := range append(own, files...) {
		if err := s.file(ctx, name); err != nil && !errors.Is(err, os.ErrNotExist) {
			return out, fmt.Errorf("search audit records: %w", err)
		}
	}
	slices.SortStableFunc(s.hits, func(a, b page.Hit) int { return b.Time.Compare(a.Time) })
	switch {
	case s.left <= 0 || ctx.Err() != nil:
		out.Partial = fmt.Sprintf("Not everything was searched: %d MiB were read in the time there is. Choose a shorter stretch, or use sallyport audit query.", (findMost-max(s.left, 0))>>20)
	case len(s.hits) > findHits:
		out.Partial = fmt.Sprintf("More fit: these are the newest %d.", findHits)
	}
	out.Hits = s.hits[:min(len(s.hits), findHits)]
	return out, nil
}

// A finder reads logs.
type finder struct {
	filter audit.Filter
	left   int64
	hits   []page.Hit
}

// file keeps the newest hits of one file.
func (s *finder) file(ctx context.Context, name string) error {
	info, err := os.Stat(name)
	if err != nil || !s.filter.Since.IsZero() && info.ModTime().Before(s.filter.Since) {
		return err
	}
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	var hits []page.Hit
	needle := []byte(cmp.Or(s.filter.ID[strings.LastIndexByte(s.filter.ID, '-')+1:], s.filter.Rule, s.filter.Decision))
	br := bufio.NewReaderSize(f, 1<<20)
	for long := false; s.left > 0 && ctx.Err() == nil; {
		b, err := br.ReadSlice('\n')
		s.left -= int64(len(b))
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			long = true
			continue
		case errors.Is(err, io.EOF):
			s.hits = append(s.hits, hits...)
			return nil
		case err != nil:
			return err
		case long || !bytes.Contains(b, needle):
			long = false
			continue
		}
		r, _, err := audit.ParseLine(b)
		if err != nil || !s.filter.Match(&r) {
			continue
		}
		if hits = append(hits, page.Hit{Record: r, Log: logOf(name)}); len(hits) > 2*findHits {
			hits = slices.Delete(hits, 0, len(hits)-findHits)
		}
	}
	s.hits = append(s.hits, hits...)
	return nil
}

// logs are the issuer's own log and its copies, and how far each is continuous.
func (in *issuer) logs(ctx context.Context) ([]page.Log, error) {
	signed, err := in.witness.signed(ctx)
	if err != nil {
		return nil, err
	}
	own := page.Log{Name: "issuer"}
	if own.Seq, err = audit.LastSeq(filepath.Join(in.cfg.DataDir, "audit.jsonl")); err != nil {
		return nil, err
	}
	out := []page.Log{own}
	in.received.mu.Lock()
	defer in.received.mu.Unlock()
	for _, c := range in.received.copies {
		l := page.Log{Name: strings.TrimSuffix(filepath.Base(c.path), ".jsonl")}
		c.mu.Lock()
		if c.mirror != nil {
			l.Seq, _ = c.mirror.Head()
		}
		c.mu.Unlock()
		heads, _ := audit.HeadsOf(signed, filepath.Base(c.path))
		for _, h := range heads {
			l.Signed, l.SignedAt = max(l.Signed, h.Size), h.Time
		}
		_, err := os.Stat(c.path + ".loose")
		l.Broken = err == nil
		out = append(out, l)
	}
	slices.SortFunc(out[1:], func(a, b page.Log) int { return cmp.Compare(a.Name, b.Name) })
	return out, nil
}
