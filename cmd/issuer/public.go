package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"sallyport/internal/daemon"
	"sallyport/internal/federation"
)

// OIDCConfig makes the issuer an OIDC provider for verifiers that know no
// SPIFFE, such as those of the clouds. Without Listen it is none.
type OIDCConfig struct {
	// Listen is host:port, by custom port 8444. It may be that of
	// bundle_endpoint.
	Listen string `yaml:"listen"`
	// Issuer is the URL under which verifiers find the listener, such as
	// "https://oidc.corp.example", and the claim iss of every JWT-SVID.
	// Required with Listen.
	Issuer string `yaml:"issuer"`
	// CertFile and KeyFile (PEM) prove the host of Issuer. Both are read anew
	// when they change. Without them the trust domain's own CA vouches for it.
	CertFile string `yaml:"cert_file"`
	KeyFile  string `yaml:"key_file"`
}

// BundleEndpointConfig publishes the trust domain's bundle for federation.
// Without Listen it is not published.
type BundleEndpointConfig struct {
	// Listen is host:port, by custom port 8444.
	Listen string `yaml:"listen"`
	// CertFile and KeyFile (PEM) make it an endpoint of the profile https_web.
	// Without them it is one of https_spiffe and proves spiffe://TD/spire/server.
	CertFile string `yaml:"cert_file"`
	KeyFile  string `yaml:"key_file"`
}

func (c *Config) validatePublic() error {
	var errs []error
	need := func(ok bool, field, what string) {
		if !ok {
			errs = append(errs, fmt.Errorf("%s: %s", field, what))
		}
	}
	o, b := c.OIDC, c.BundleEndpoint
	if o.Listen != "" || o.Issuer != "" {
		if err := federation.CheckIssuer(o.Issuer); err != nil {
			need(false, "oidc.issuer", err.Error()+`; write the URL that verifiers use, such as "https://oidc.corp.example"`)
		}
	}
	need((o.CertFile == "") == (o.KeyFile == ""), "oidc.key_file", "cert_file and key_file belong together; write both or none")
	need((b.CertFile == "") == (b.KeyFile == ""), "bundle_endpoint.key_file", "cert_file and key_file belong together; write both or none")
	need(o.Listen == "" || o.Listen != b.Listen || o.CertFile == b.CertFile && o.KeyFile == b.KeyFile, "bundle_endpoint.cert_file",
		"differs from oidc.cert_file on the same listener; make them equal, or choose another listen")
	return errors.Join(errs...)
}

// A publicDoor is one listener for public documents, or for the page.
type publicDoor struct {
	ln  net.Listener
	srv *http.Server
}

// openDoors opens the listeners for public documents and for the page.
func (in *issuer) openDoors() ([]publicDoor, error) {
	doors, err := in.publicDoors()
	if err != nil || in.cfg.Page.Listen == "" {
		return doors, err
	}
	d, err := in.openPage()
	if err != nil {
		for _, d := range doors {
			d.ln.Close()
		}
		return nil, err
	}
	return append(doors, d), nil
}

// publicDoors opens the listeners for public documents.
func (in *issuer) publicDoors() (doors []publicDoor, err error) {
	defer func() {
		if err != nil {
			for _, d := range doors {
				d.ln.Close()
			}
		}
	}()
	o, b := in.cfg.OIDC, in.cfg.BundleEndpoint
	open := func(field, listen, certFile, keyFile string, mux *http.ServeMux) error {
		ln, err := in.doors.TCP(field+".listen", listen)
		if err != nil {
			return err
		}
		cert, err := in.publicCertificate(certFile, keyFile)
		if err != nil {
			ln.Close()
			return fmt.Errorf("%s: %w", field, err)
		}
		doors = append(doors, publicDoor{ln, federation.NewHTTPServer(mux, cert, in.log)})
		return nil
	}
	mux := http.NewServeMux()
	if o.Listen != "" {
		h, err := federation.OIDCHandler(o.Issuer, in.bundleDocument, in.log)
		if err != nil {
			return doors, err
		}
		mux.Handle("/", h)
		if err := open("oidc", o.Listen, o.CertFile, o.KeyFile, mux); err != nil {
			return doors, err
		}
	}
	if b.Listen == "" {
		return doors, nil
	}
	h := federation.BundleHandler(in.bundleDocument, in.log)
	if b.Listen == o.Listen {
		mux.Handle("/{$}", h)
		return doors, nil
	}
	own := http.NewServeMux()
	own.Handle("/{$}", h)
	return doors, open("bundle_endpoint", b.Listen, b.CertFile, b.KeyFile, own)
}

// serveDoors serves at all of them until ctx ends.
func (in *issuer) serveDoors(ctx context.Context, doors []publicDoor) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, d := range doors {
		g.Go(func() error { return d.run(ctx) })
	}
	if in.page != nil {
		g.Go(func() error { return in.page.Run(ctx) })
	}
	return g.Wait()
}

// run serves until ctx ends.
func (d publicDoor) run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() {
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		_ = d.srv.Shutdown(grace)
		_ = d.srv.Close() // a live view ends by itself never
	})
	defer stop()
	serve := func() error { return d.srv.ServeTLS(d.ln, "", "") }
	if d.srv.TLSConfig == nil {
		serve = func() error { return d.srv.Serve(d.ln) } // the page on this machine
	}
	if err := serve(); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve %s: %w", d.ln.Addr(), err)
	}
	return nil
}

// bundleDocument is what the trust domain publishes now.
func (in *issuer) bundleDocument() *federation.Bundle {
	b := in.ca.Bundle()
	if len(b.X509) == 0 {
		return nil
	}
	out := &federation.Bundle{TrustDomain: in.cfg.TrustDomain, X509: b.X509, Sequence: b.Sequence, RefreshHint: b.RefreshHint}
	for _, k := range b.JWT {
		out.JWT = append(out.JWT, federation.Key{ID: k.KeyID, Public: k.PublicKey})
	}
	if in.name == "" {
		return out
	}
	// Issuers that share a store publish each other's keys. Each counts its
	// own changes, so a sequence number would mean nothing.
	out.Sequence = 0
	for _, k := range in.registry.Keys() {
		if !slices.ContainsFunc(out.JWT, func(own federation.Key) bool { return own.ID == k.KeyID }) {
			out.JWT = append(out.JWT, federation.Key{ID: k.KeyID, Public: k.PublicKey})
		}
	}
	slices.SortFunc(out.JWT, func(a, b federation.Key) int { return strings.Compare(a.ID, b.ID) })
	return out
}

// publicCertificate gives what a public listener proves: the files, or the
// issuer's own SVID, which also names the host of oidc.issuer.
func (in *issuer) publicCertificate(certFile, keyFile string) (func(*tls.ClientHelloInfo) (*tls.Certificate, error), error) {
	if certFile != "" {
		p := &pair{cert: certFile, key: keyFile}
		_, err := p.get(nil)
		return p.get, err
	}
	var dns []string
	if u, err := url.Parse(in.cfg.OIDC.Issuer); err == nil && u.Hostname() != "" && net.ParseIP(u.Hostname()) == nil {
		dns = append(dns, u.Hostname())
	}
	keep := in.ca.NewServer(dns...)
	return func(h *tls.ClientHelloInfo) (*tls.Certificate, error) { return keep.Certificate(h.Context()) }, nil
}

// A pair is a certificate and key on disk, read anew when one has changed.
type pair struct {
	cert, key string

	mu     sync.Mutex // guards what stands below
	loaded *tls.Certificate
	at     [2]time.Time
}

// get gives the newest pair. While the files do not fit together, as in the
// middle of their replacement, the former pair serves.
func (p *pair) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var at [2]time.Time
	for i, f := range []string{p.cert, p.key} {
		info, err := os.Stat(f)
		if err != nil && p.loaded == nil {
			if errors.Is(err, fs.ErrNotExist) {
				err = daemon.Hint(fmt.Errorf("certificate file %s does not exist", f), "write the file, or correct its name in the configuration")
			}
			return nil, err
		}
		if err == nil {
			at[i] = info.ModTime()
		}
	}
	if p.loaded != nil && at == p.at {
		return p.loaded, nil
	}
	c, err := tls.LoadX509KeyPair(p.cert, p.key)
	if err != nil && p.loaded == nil {
		return nil, fmt.Errorf("read certificate %s: %w", p.cert, err)
	}
	if err == nil {
		p.loaded, p.at = &c, at
	}
	return p.loaded, nil
}
