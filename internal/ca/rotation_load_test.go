package ca

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
	"sallyport/internal/svid"
)

// A proxyOf is the identity side of a proxy whose issuer is a CA in the same
// process: it fetches when the CA changes, as after a push.
type proxyOf struct {
	c      *CA
	id     spiffeid.ID
	source *svid.Source
	rot    *svid.Rotator
	mints  atomic.Int64
}

func newProxy(t *testing.T, c *CA, name string) *proxyOf {
	t.Helper()
	p := &proxyOf{c: c, id: spiffeid.RequireFromPath(td, "/"+name), source: svid.NewSource()}
	var err error
	p.rot, err = svid.NewRotator(svid.RotatorConfig{
		Source: p.source, Minter: p, Match: func(es []mesh.Entry) []mesh.Entry { return es }, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *proxyOf) Entries(context.Context) ([]mesh.Entry, error) {
	return []mesh.Entry{{ID: "e", SPIFFEID: p.id}}, nil
}

func (p *proxyOf) Trust(context.Context) (svid.Trust, error) {
	b := p.c.Bundle()
	t := svid.Trust{Bundle: x509bundle.FromX509Authorities(td, b.X509), Tainted: b.Tainted, JWTKeys: map[string]crypto.PublicKey{}}
	for _, k := range b.JWT {
		t.JWTKeys[k.KeyID] = k.PublicKey
	}
	return t, nil
}

func (p *proxyOf) MintX509(ctx context.Context, e mesh.Entry, key crypto.Signer) ([]*x509.Certificate, error) {
	p.mints.Add(1)
	d, err := p.c.Prepare(X509Request{ID: e.SPIFFEID, PublicKey: key.Public()})
	if err != nil {
		return nil, err
	}
	return p.c.Sign(ctx, d)
}

// follow syncs at each change of the CA.
func (p *proxyOf) follow(ctx context.Context) {
	for changed := p.c.Changed(); ; changed = p.c.Changed() {
		p.rot.Sync()
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
	}
}

// holder is what the proxy acknowledges.
func (p *proxyOf) holder() Holder {
	h := Holder{Name: p.id.Path()}
	if st := p.source.Current(); st != nil {
		h.Trusts = idsOf(st.Bundle.X509Authorities())
		for kid := range st.JWTKeys {
			h.Trusts = append(h.Trusts, kid)
		}
		for _, id := range st.Identities {
			if root := id.Root(st.Bundle); root != nil {
				h.Shows = append(h.Shows, RootID(root))
			}
		}
	}
	return h
}

// call makes one mutual handshake and exchanges a byte each way.
func call(from, to *proxyOf) error {
	a, b := net.Pipe()
	defer a.Close()
	served := make(chan error, 1)
	go func() {
		defer b.Close()
		s := tls.Server(b, svid.ServerTLS(to.source, func(spiffeid.ID) error { return nil }))
		_, err := io.CopyN(s, s, 1)
		served <- err
	}()
	c := tls.Client(a, svid.ClientTLS(from.source, to.id))
	if _, err := c.Write([]byte{1}); err != nil {
		return fmt.Errorf("client: %w", err)
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		return fmt.Errorf("client: %w", err)
	}
	return <-served
}

// TestNoHandshakeFailsWhileTheRootRotates calls between two proxies without
// pause while the root is replaced three times, by every gate and unforced.
func TestNoHandshakeFailsWhileTheRootRotates(t *testing.T) {
	cfg := config(t)
	cfg.AllowShort = true
	cfg.X509TTL, cfg.JWTTTL = time.Minute, time.Second
	var proxies []*proxyOf
	cfg.Holders = func() (out []Holder, known bool) {
		for _, p := range proxies {
			out = append(out, p.holder())
		}
		return out, true
	}
	c := open(t, cfg)
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	proxies = []*proxyOf{newProxy(t, c, "client"), newProxy(t, c, "server")}
	for _, p := range proxies {
		running.Go(func() { p.rot.Run(ctx) })
		running.Go(func() { p.follow(ctx) })
		if err := p.source.WaitReady(ctx); err != nil {
			t.Fatal(err)
		}
	}
	running.Go(func() { c.Run(ctx) })
	var made, failed atomic.Int64
	for i := range 2 {
		running.Go(func() {
			for ctx.Err() == nil {
				if err := call(proxies[i], proxies[1-i]); err != nil && failed.Add(1) < 5 {
					t.Errorf("phase %s: %v", c.Rotation().Phase, err)
				}
				made.Add(1)
			}
		})
	}
	seen := []string{RootID(c.Bundle().X509[0])}
	for range 3 {
		if _, err := c.Rotate(ctx, AtOnce, false); err != nil {
			t.Fatal(err)
		}
		for {
			changed := c.Changed()
			if c.Rotation().Phase == Steady {
				break
			}
			select {
			case <-changed:
			case <-time.After(30 * time.Second):
				t.Fatalf("stands in %+v", c.Rotation())
			}
		}
		if now := RootID(c.Bundle().X509[0]); slices.Contains(seen, now) {
			t.Error("the root is the old one")
		} else {
			seen = append(seen, now)
		}
	}
	t.Logf("%d handshakes made, %d failed, root replaced %d times, %d SVIDs", made.Load(), failed.Load(), len(seen)-1, proxies[0].mints.Load()+proxies[1].mints.Load())
}
