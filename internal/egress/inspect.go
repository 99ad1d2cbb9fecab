package egress

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/http1"
	"sallyport/internal/mesh"
)

// InspectionHost is a name that a gateway itself answers: with the certificate of
// its Inspector, in PEM.
const InspectionHost = "inspection." + mesh.Domain

const (
	// inspectorLife is how long the certificate of an Inspector is good for; one of
	// half that age is made anew. leafLife is the same of those that it signs.
	inspectorLife = 365 * 24 * time.Hour
	leafLife      = 24 * time.Hour
)

// An Inspector is the authority by which the gateway stands in for hosts whose
// destination says tls: inspect. Its certificate is constrained to their names:
// whoever trusts it is told nothing about any other. The key leaves the gateway
// in no way. It is safe for concurrent use.
type Inspector struct {
	key, leafKey crypto.Signer

	mu     sync.Mutex // guards what follows
	names  []string
	ca     *x509.Certificate // nil without names
	leaves map[string]*tls.Certificate
}

// OpenInspector reads the key from a file, or makes one and keeps it there.
// Gateways that have the same key are trusted by the same certificate.
func OpenInspector(file string) (*Inspector, error) {
	key, err := inspectorKey(file)
	if err != nil {
		return nil, fmt.Errorf("inspection key: %w", err)
	}
	leafKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	return &Inspector{key: key, leafKey: leafKey}, nil
}

func inspectorKey(file string) (crypto.Signer, error) {
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return makeInspectorKey(file)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if m := info.Mode().Perm(); m&0o077 != 0 {
		return nil, fmt.Errorf("%s has mode %04o, which lets other users in: whoever has read it can stand in for inspected hosts; chmod it to 0600 if nobody has, else remove it to have another made", file, m)
	}
	b, err := io.ReadAll(f)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, fmt.Errorf("%s holds no PRIVATE KEY in PEM", file)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if k, ok := key.(*ecdsa.PrivateKey); ok {
		return k, nil
	}
	return nil, fmt.Errorf("%s holds a key of another kind than ECDSA", file)
}

func makeInspectorKey(file string) (crypto.Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	err = pem.Encode(f, &pem.Block{Type: "PRIVATE KEY", Bytes: der})
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return nil, errors.Join(err, os.Remove(file))
	}
	return key, nil
}

// Use has the Inspector stand in for the hosts of s that are inspected, and for no
// others.
func (i *Inspector) Use(s *mesh.Snapshot) error {
	var names []string
	for _, d := range s.Destinations {
		if d.TLS == mesh.Inspect {
			name := d.Host
			if name[0] == '*' {
				name = name[1:]
			}
			names = append(names, name)
		}
	}
	slices.Sort(names)
	i.mu.Lock()
	defer i.mu.Unlock()
	if slices.Equal(names, i.names) {
		return i.renew()
	}
	return i.become(names)
}

// renew makes the certificate anew when it is half over: a policy may be in force
// for as long. The caller holds the lock.
func (i *Inspector) renew() error {
	if i.ca == nil || time.Until(i.ca.NotAfter) > inspectorLife/2 {
		return nil
	}
	return i.become(i.names)
}

// become has the Inspector stand in for names. The caller holds the lock.
func (i *Inspector) become(names []string) error {
	if len(names) == 0 {
		i.names, i.ca, i.leaves = nil, nil, nil
		return nil
	}
	ca, err := i.certify(names)
	if err != nil {
		return fmt.Errorf("certificate for inspection: %w", err)
	}
	i.names, i.ca, i.leaves = names, ca, make(map[string]*tls.Certificate)
	return nil
}

// certify signs the Inspector's own certificate, for these names.
func (i *Inspector) certify(names []string) (*x509.Certificate, error) {
	t, err := template("Sallyport inspection", inspectorLife)
	if err != nil {
		return nil, err
	}
	t.IsCA, t.BasicConstraintsValid, t.MaxPathLenZero = true, true, true
	t.KeyUsage = x509.KeyUsageCertSign
	t.PermittedDNSDomainsCritical, t.PermittedDNSDomains = true, names
	for _, all := range []string{"0.0.0.0/0", "::/0"} {
		p := netip.MustParsePrefix(all)
		t.ExcludedIPRanges = append(t.ExcludedIPRanges, &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(0, p.Addr().BitLen())})
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, i.key.Public(), i.key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func template(name string, life time.Duration) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-time.Minute), NotAfter: now.Add(life),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, nil
}

// PEM is the certificate that workloads are to trust; nil when no host is
// inspected.
func (i *Inspector) PEM() []byte {
	i.mu.Lock()
	defer i.mu.Unlock()
	_ = i.renew() // when that fails, the one of before is still good
	if i.ca == nil {
		return nil
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.ca.Raw})
}

// maxLeaves is how many certificates are kept: a pattern has many names.
const maxLeaves = 4096

// leaf is the certificate by which the gateway stands in for a host.
func (i *Inspector) leaf(host string) (*tls.Certificate, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	_ = i.renew()
	if i.ca == nil {
		return nil, errors.New("no host is inspected")
	}
	if c := i.leaves[host]; c != nil && time.Until(c.Leaf.NotAfter) > leafLife/2 {
		return c, nil
	}
	t, err := template(host, leafLife)
	if err != nil {
		return nil, err
	}
	if len(host) > 64 {
		t.Subject = pkix.Name{} // a longer one is none
	}
	t.DNSNames, t.KeyUsage = []string{host}, x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, t, i.ca, i.leafKey.Public(), i.key)
	if err != nil {
		return nil, err
	}
	c := &tls.Certificate{Certificate: [][]byte{der, i.ca.Raw}, PrivateKey: i.leafKey}
	if c.Leaf, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	if len(i.leaves) >= maxLeaves {
		clear(i.leaves)
	}
	i.leaves[host] = c
	return c, nil
}

// A replay is a connection of which the beginning has been read.
type replay struct {
	net.Conn
	head []byte
}

func (r *replay) Read(p []byte) (int, error) {
	if len(r.head) == 0 {
		return r.Conn.Read(p)
	}
	n := copy(p, r.head)
	if r.head = r.head[n:]; len(r.head) == 0 {
		r.head = nil // for as long as the connection lasts
	}
	return n, nil
}

// speaks is what the gateway speaks with callers in the place of a host: HTTP/2 where
// it may speak that with the host.
func speaks(how *mesh.Destination) []string {
	if slices.Contains(how.ALPN, mesh.ALPNHTTP2) {
		return []string{mesh.ALPNHTTP2, mesh.ALPNHTTP1}
	}
	return []string{mesh.ALPNHTTP1}
}

// checkSpoken refuses a hello that offers protocols, and none that the gateway speaks.
func (h *Hello) checkSpoken(spoken []string) error {
	if len(h.ALPN) == 0 || slices.ContainsFunc(h.ALPN, func(p string) bool { return slices.Contains(spoken, p) }) {
		return nil
	}
	return refuse(ReasonALPN, "the ClientHello offers %s; in the place of this host the gateway speaks %s, as alpn of its destination has it",
		clip(strings.Join(h.ALPN, ", ")), strings.Join(spoken, ", "))
}

// standIn makes the handshake in a tunnel in the host's place, under the rules of
// a tunnel that is passed through. It returns nil when that came to nothing, which
// is recorded.
func (g *Gateway) standIn(ctx context.Context, t *tunnel, c net.Conn) *tls.Conn {
	ctx, cancel := context.WithTimeout(ctx, g.lim.HelloTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(past) })
	hello, err := ReadHello(c)
	if err == nil {
		err = hello.Check(t.host, &t.how)
	}
	spoken := speaks(&t.how)
	if err == nil {
		err = hello.checkSpoken(spoken)
	}
	late := !stop()
	if err == io.EOF && len(hello.Raw) == 0 && !late {
		return nil
	}
	var cert *tls.Certificate
	switch {
	case late:
		err = refuse(ReasonHelloTime, "no whole ClientHello came within %v", g.lim.HelloTimeout)
	case err == nil && g.cfg.Inspector == nil:
		err = refuse(ReasonInspect, "this gateway inspects nothing")
	case err == nil:
		cert, err = g.cfg.Inspector.leaf(t.host.String())
	}
	if err == nil {
		_ = c.SetReadDeadline(time.Time{})
		tc := tls.Server(&replay{c, hello.Raw}, &tls.Config{
			Certificates: []tls.Certificate{*cert}, MinVersion: tls.VersionTLS12, NextProtos: spoken, SessionTicketsDisabled: true,
		})
		if err = tc.HandshakeContext(ctx); err == nil {
			return tc
		}
		err = g.notShaken(ctx, t, err)
	}
	var ref *Refusal
	if !errors.As(err, &ref) {
		err = refuse(ReasonReset, "the tunnel ended before its first bytes were whole: %v", err)
	}
	g.deny(t.record(audit.KindDecision), err)
	if alert := alertFor(reasonOf(err)); alert != 0 {
		_ = c.SetWriteDeadline(time.Now().Add(alertTime))
		_, _ = c.Write([]byte{21, 3, 3, 0, 2, 2, alert})
	}
	return nil
}

// notShaken says why the handshake in the place of a host came to nothing.
func (g *Gateway) notShaken(ctx context.Context, t *tunnel, err error) *Refusal {
	var op *net.OpError
	switch reason := t.why(); {
	case reason != "" && reason != ReasonReset:
		return errEnded(reason)
	case ctx.Err() != nil && reason == "":
		return refuse(ReasonHelloTime, "the handshake with the gateway was not over within %v", g.lim.HelloTimeout)
	case errors.As(err, &op) && op.Op == "remote error": // so crypto/tls names an alert
		return refuse(ReasonInspect, "the caller ended the handshake with the gateway, most likely since it does not trust the certificate for inspection: %v", err)
	}
	return refuse(ReasonInspect, "the handshake with the gateway in the place of the host failed: %v", err)
}

// tellInspection answers a request for the certificate for inspection, if it is
// one. Whoever has an SVID that holds may know it.
func (g *Gateway) tellInspection(a *asker, req *http1.Request) (keep, told bool) {
	if g.cfg.Inspector == nil || a.in != nil || req.Verb() != "GET" || string(req.Authority) != InspectionHost {
		return false, false
	}
	t := &tunnel{who: a.who, call: authz.Call{Dir: mesh.Out, Src: a.who.id, Verb: req.Verb(), Peer: a.who.peer}}
	if ans := g.proves(t); ans != nil {
		req.KeepAlive = false
		return ans.write1(a.hc, req, nil), true
	}
	keep, err := a.hc.WriteAnswer(req, 200, []byte("Content-Type: application/x-pem-file\r\n"), g.cfg.Inspector.PEM())
	return keep && err == nil, true
}
