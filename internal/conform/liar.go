package conform

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

// A liar is a bundle endpoint that shows what it is told to show.
type liar struct {
	d        *Domain
	id       string // what the endpoint proves
	url      string
	otherURL string // the same documents, behind a proof of another ID
	plain    string // the same documents, in clear
	*state

	good *tls.Certificate
	srvs []*http.Server
}

// shown is what the endpoint shows at a time.
type shown struct {
	cert     *tls.Certificate
	of       *Domain              // whose document, nil for its own
	change   func(map[string]any) // of the document
	bare     bool                 // no keys at all
	redirect string
}

// A moment is what the endpoint shows at a time, and which key its document has.
// A connection is shown that of when it was accepted: the certificate is that of
// the document, whenever the server looks by itself.
type moment struct {
	shown
	mark int
}

// atAccept is where the context of a connection has its moment.
type atAccept struct{}

func momentOf(ctx context.Context) moment {
	m, _ := ctx.Value(atAccept{}).(moment)
	return m
}

// state is what the endpoint shows now; several liars may be behind one
// endpoint.
type state struct {
	mu  sync.Mutex // guards what follows
	now moment
}

// show has the endpoint be right in everything but one thing.
func (l *liar) show(change func(*shown)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.now.shown = shown{}
	if change != nil {
		change(&l.now.shown)
	}
}

// next gives the document another key, and names it.
func (s *state) next() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now.mark++
	return fmt.Sprintf("conform-mark-%d", s.now.mark)
}

func (s *state) current() moment {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now
}

// openLiar listens for an endpoint of the trust domain.
func openLiar(listen string, d *Domain) (*liar, error) {
	l := &liar{d: d, id: d.id("/endpoint"), state: &state{}}
	good, err := l.prove(l.id)
	if err != nil {
		return nil, err
	}
	other, err := l.prove(d.id("/other"))
	if err != nil {
		return nil, err
	}
	l.good = good
	host, _, err := net.SplitHostPort(listen)
	if err != nil {
		return nil, err
	}
	addr, err := l.open(listen, func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
		if then := momentOf(hello.Context()); then.cert != nil {
			return then.cert, nil
		}
		return l.good, nil
	}, false)
	if err != nil {
		return nil, err
	}
	l.url = "https://" + addr
	addr, err = l.open(net.JoinHostPort(host, "0"), func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return other, nil }, true)
	if err != nil {
		l.close()
		return nil, err
	}
	l.otherURL = "https://" + addr
	addr, err = l.open(net.JoinHostPort(host, "0"), nil, true)
	if err != nil {
		l.close()
		return nil, err
	}
	l.plain = "http://" + addr
	return l, nil
}

// prove makes a certificate of the trust domain that is right.
func (l *liar) prove(id string) (*tls.Certificate, error) {
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	leaf, err := l.d.sign(l.d.leaf(id), l.d.root, key.Public(), l.d.key)
	if err != nil {
		return nil, err
	}
	return pair(key, leaf), nil
}

// open serves documents, in clear without a certificate. direct means that no
// redirect is shown there.
func (l *liar) open(listen string, cert func(*tls.ClientHelloInfo) (*tls.Certificate, error), direct bool) (string, error) {
	ln, err := net.Listen("tcp", listen)
	if err != nil {
		return "", err
	}
	srv := &http.Server{
		Handler:           http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { l.answer(w, r, direct) }),
		ReadHeaderTimeout: patience, WriteTimeout: patience, ErrorLog: log.New(io.Discard, "", 0),
		ConnContext: func(ctx context.Context, _ net.Conn) context.Context {
			return context.WithValue(ctx, atAccept{}, l.current())
		},
	}
	srv.SetKeepAlivesEnabled(false) // each look is a connection of its own
	l.srvs = append(l.srvs, srv)
	if cert == nil {
		go srv.Serve(ln) //nolint:errcheck // ends with close
		return ln.Addr().String(), nil
	}
	srv.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: cert, SessionTicketsDisabled: true}
	go srv.ServeTLS(ln, "", "") //nolint:errcheck // ends with close
	return ln.Addr().String(), nil
}

func (l *liar) close() {
	for _, s := range l.srvs {
		_ = s.Close()
	}
}

// answer gives the document, or the redirect.
func (l *liar) answer(w http.ResponseWriter, r *http.Request, direct bool) {
	then := momentOf(r.Context())
	if then.redirect != "" && !direct && r.URL.Path != "/direct" {
		http.Redirect(w, r, then.redirect, http.StatusFound)
		return
	}
	d := l.d
	if then.of != nil {
		d = then.of
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(d.document(func(doc map[string]any) {
		doc["spiffe_sequence"] = then.mark + 1
		keys, _ := doc["keys"].([]any)
		k := jwk(d.jwt[kidES256].Public())
		k["kid"], k["use"] = fmt.Sprintf("conform-mark-%d", then.mark), "jwt-svid"
		doc["keys"] = append(keys, k)
		if then.change != nil {
			then.change(doc)
		}
		if then.bare {
			doc["keys"] = []any{}
		}
	}))
}

// onWire is the first bundle of the trust domain, for a federation.
func (l *liar) onWire() *types.Bundle {
	return &types.Bundle{TrustDomain: l.d.td.Name(), X509Authorities: []*types.X509Certificate{{Asn1: l.d.root.Raw}}, RefreshHint: 3600}
}

// A badProof is a certificate that must not prove the endpoint.
type badProof struct {
	musts []int
	name  string
	cert  *tls.Certificate
}

// badProofs are those that the trust domain's own authority signed, or seems
// to have signed.
func (l *liar) badProofs() (out []badProof) {
	add := func(name string, cert *tls.Certificate, musts ...int) { out = append(out, badProof{musts, name, cert}) }
	leaf := func(name string, change func(*x509.Certificate), musts ...int) {
		key, err := newKey()
		if err != nil {
			return
		}
		tpl := l.d.leaf(l.id)
		change(tpl)
		if c, err := l.d.sign(tpl, l.d.root, key.Public(), l.d.key); err == nil {
			add(name, pair(key, c), musts...)
		}
	}
	names := func(uris ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.ExtraExtensions = []pkix.Extension{uriNames(true, uris...)} }
	}
	leaf("another ID", names(l.d.id("/other")), 92)
	leaf("no SPIFFE ID", func(c *x509.Certificate) { c.ExtraExtensions, c.DNSNames = nil, []string{"localhost"} }, 92)
	leaf("two SPIFFE IDs", names(l.id, l.d.id("/other")), 18)
	leaf("its ID and another URI", names(l.id, "https://conform.example"), 18)
	leaf("an https URI", names("https"+l.id[len("spiffe"):]), 32)
	leaf("an ID without path", names(l.d.id("")), 33)
	leaf("a leaf with cA", func(c *x509.Certificate) { c.IsCA = true; c.KeyUsage |= x509.KeyUsageCertSign }, 22, 30)
	leaf("a leaf with keyCertSign", func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }, 31)
	leaf("a leaf with cRLSign", func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }, 31)
	leaf("an expired certificate", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-30 * time.Second) }, 29)
	leaf("a certificate of tomorrow", func(c *x509.Certificate) {
		c.NotBefore = time.Now().Add(24 * time.Hour)
		c.NotAfter = time.Now().Add(48 * time.Hour)
	}, 29)
	leaf("an unknown critical extension", func(c *x509.Certificate) {
		c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 32473, 1}, Critical: true, Value: []byte{5, 0}})
	}, 29)
	add("the root itself", pair(l.d.key, l.d.root), 22)
	if c, err := l.underALeaf(); err == nil {
		add("a certificate that another workload signed", c, 29)
	}
	if fake, err := quickDomain(l.d.td); err == nil {
		other := &liar{d: fake}
		if c, err := other.prove(l.id); err == nil {
			add("a certificate of another authority of that name", c, 29, 92)
		}
	}
	return out
}

// underALeaf is what a workload could sign with its own SVID.
func (l *liar) underALeaf() (*tls.Certificate, error) {
	key, err := newKey()
	sub, serr := newKey()
	if err := errors.Join(err, serr); err != nil {
		return nil, err
	}
	leaf, err := l.d.sign(l.d.leaf(l.d.id("/workload")), l.d.root, key.Public(), l.d.key)
	if err != nil {
		return nil, err
	}
	c, err := l.d.sign(l.d.leaf(l.id), leaf, sub.Public(), key)
	if err != nil {
		return nil, err
	}
	return pair(sub, c, leaf, l.d.root), nil
}

func b64(der []byte) string { return base64.StdEncoding.EncodeToString(der) }
