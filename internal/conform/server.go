package conform

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"sallyport/internal/svid"
)

// A Server says which SPIRE Server API is looked at, and how. What is left out
// is not looked at.
type Server struct {
	// Address is host:port of the API for agents. Required.
	Address string
	// Roots verify the server. Default: those that it names itself, so that
	// the check says nothing about whose server it is.
	Roots []*x509.Certificate
	// Operator is the path of the Unix socket for operators. There SVIDs are
	// minted, and a node, an entry and federations are made and taken away.
	Operator string
	// Admin is an SVID with an admin's rights, in place of Operator.
	Admin *tls.Certificate
	// JoinToken attests a node, when neither Operator nor Admin can make one.
	JoinToken string
	// BundleEndpoint is the URL of the bundle document.
	BundleEndpoint string
	// OIDC is the issuer's URL, below which the discovery document is.
	OIDC string
	// WebRoots verify BundleEndpoint and OIDC when they prove no SPIFFE ID.
	// Default: those of the system.
	WebRoots *x509.CertPool
	// Listen is host:port at which the server can reach a bundle endpoint of
	// the check's own, which lies to it.
	Listen string
	// Domain is a trust domain that the server already follows at Listen, for
	// a server that takes no federation by call.
	Domain *Domain
}

// Validate reports all mistakes at once.
func (s Server) Validate() error {
	var errs []error
	if _, _, err := net.SplitHostPort(s.Address); err != nil {
		errs = append(errs, fmt.Errorf("address: %q is not host:port", s.Address))
	}
	if s.Listen != "" {
		if _, _, err := net.SplitHostPort(s.Listen); err != nil {
			errs = append(errs, fmt.Errorf("listen: %q is not host:port", s.Listen))
		}
	}
	for field, u := range map[string]string{"bundle_endpoint": s.BundleEndpoint, "oidc": s.OIDC} {
		if u != "" && checkURL(u) != nil {
			errs = append(errs, fmt.Errorf("%s: %w", field, checkURL(u)))
		}
	}
	if s.Domain != nil && s.Listen == "" {
		errs = append(errs, errors.New("domain: has no meaning without listen"))
	}
	return errors.Join(errs...)
}

// A survey is one run against one server.
type survey struct {
	report
	cfg   Server
	ctx   context.Context
	td    string // the name of the trust domain
	roots []*x509.Certificate
	admin grpc.ClientConnInterface // nil without an operator's rights
	kids  []string                 // of the JWT keys that GetBundle names
	doc   *document                // as it was before anything was signed
	asked atomic.Bool              // a public endpoint asked for a client certificate
}

// RunServer asks a server. The error says that nothing could be asked at all.
func RunServer(ctx context.Context, s Server) ([]Verdict, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*patience)
	defer cancel()
	v := &survey{cfg: s, ctx: ctx}
	v.form = ServerForm
	cc, chain, err := v.dial(nil)
	if err != nil {
		return nil, fmt.Errorf("ask %s for its bundle: %w", s.Address, err)
	}
	defer cc.Close()
	if err := v.bundle(cc, chain); err != nil {
		return nil, fmt.Errorf("ask %s for its bundle: %w", s.Address, err)
	}
	_ = v.chain("the server", chain, v.roots, "spiffe://"+v.td+"/spire/server")
	for _, c := range v.roots {
		_ = v.authority(c)
	}
	if err := v.operator(); err != nil {
		return nil, err
	}
	v.documents()
	v.strangers()
	if v.admin == nil {
		v.skip("it takes an operator's rights: --socket, or --svid and --key", nameMusts...)
		v.skip("it takes an operator's rights: --socket, or --svid and --key", tokenMusts...)
		v.skip("it takes an operator's rights: --socket, or --svid and --key", federationMusts...)
	} else {
		v.mint()
		v.mintToken()
		v.follow()
	}
	v.node()
	v.oidc()
	v.documentsAgain()
	return v.verdicts(), nil
}

// dial connects with a client certificate, or none, makes one call that
// everybody may make, and gives the server's chain.
func (v *survey) dial(cert *tls.Certificate) (*grpc.ClientConn, []*x509.Certificate, error) {
	var shown atomic.Pointer[[]*x509.Certificate]
	c := &tls.Config{
		MinVersion: tls.VersionTLS12,
		// What the server shows is looked at afterwards, by number.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			shown.Store(&cs.PeerCertificates)
			return nil
		},
	}
	if cert != nil {
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	cc, err := grpc.NewClient("passthrough:///"+v.cfg.Address, grpc.WithTransportCredentials(credentials.NewTLS(c)))
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(v.ctx, patience)
	defer cancel()
	if _, err := bundlev1.NewBundleClient(cc).GetBundle(ctx, &bundlev1.GetBundleRequest{}); err != nil {
		cc.Close()
		return nil, nil, err
	}
	return cc, *shown.Load(), nil
}

// bundle reads the bundle that the server gives to everybody.
func (v *survey) bundle(cc *grpc.ClientConn, chain []*x509.Certificate) error {
	ctx, cancel := context.WithTimeout(v.ctx, patience)
	defer cancel()
	b, err := bundlev1.NewBundleClient(cc).GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return err
	}
	v.td = b.TrustDomain
	certs, err := authorities(b)
	const what = "GetBundle"
	v.say(what, err, 29)
	v.say(what, fails(len(certs) > 0, "it names no X.509 authority"), 14)
	for _, k := range b.JwtAuthorities {
		_, err := x509.ParsePKIXPublicKey(k.PublicKey)
		v.say(what, err, 42)
		v.say(what, fails(k.KeyId != "", "a JWT key has no ID"), 53)
		v.kids = append(v.kids, k.KeyId)
	}
	if v.roots = v.cfg.Roots; len(v.roots) == 0 {
		v.roots = certs
	}
	uris, err := svid.URINames(chain[0])
	if err == nil && len(uris) == 1 {
		v.say("the server", fails(domainOf(uris[0]) == "spiffe://"+v.td, "it is %s, and gives the bundle of %s", uris[0], v.td), 14)
	}
	return nil
}

// authorities are the CA certificates of a bundle on the wire.
func authorities(b *types.Bundle) (out []*x509.Certificate, err error) {
	for _, a := range b.GetX509Authorities() {
		c, perr := x509.ParseCertificate(a.Asn1)
		if perr != nil {
			err = errors.Join(err, perr)
			continue
		}
		out = append(out, c)
	}
	return out, err
}

// operator connects with the rights of one.
func (v *survey) operator() error {
	switch {
	case v.cfg.Operator != "":
		cc, err := grpc.NewClient("unix:"+v.cfg.Operator, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return err
		}
		context.AfterFunc(v.ctx, func() { cc.Close() })
		ctx, cancel := context.WithTimeout(v.ctx, patience)
		defer cancel()
		if _, err := bundlev1.NewBundleClient(cc).GetBundle(ctx, &bundlev1.GetBundleRequest{}); err != nil {
			return fmt.Errorf("ask %s for its bundle: %w", v.cfg.Operator, err)
		}
		v.admin = cc
	case v.cfg.Admin != nil:
		cc, _, err := v.dial(v.cfg.Admin)
		if err != nil {
			return fmt.Errorf("connect to %s with the operator's SVID: %w", v.cfg.Address, err)
		}
		context.AfterFunc(v.ctx, func() { cc.Close() })
		v.admin = cc
	}
	return nil
}

// strangers shows the server client certificates that chain to nowhere.
func (v *survey) strangers() {
	td, err := domainName(v.td)
	if err != nil {
		v.say("the trust domain of the server", err, 1, 6)
		return
	}
	fake, err := quickDomain(td)
	if err != nil {
		return
	}
	key, err := newKey()
	if err != nil {
		return
	}
	leaf, err := fake.sign(fake.leaf(fake.id("/spire/agent/join_token/conform")), fake.root, key.Public(), fake.key)
	if err != nil {
		v.say("making a certificate", err, 29)
		return
	}
	v.refused("a client certificate of a CA that only calls itself one of "+v.td, pair(key, leaf, fake.root), 29, 82)
	v.refused("a CA as client", pair(fake.key, fake.root), 22)
}

// refused notes whether the server refuses a client certificate.
func (v *survey) refused(what string, cert *tls.Certificate, musts ...int) {
	cc, _, err := v.dial(cert)
	if err == nil {
		cc.Close()
	}
	v.say(what, fails(err != nil, "it is let in"), musts...)
}

// pair is a certificate with its key for a handshake.
func pair(key *ecdsa.PrivateKey, chain ...*x509.Certificate) *tls.Certificate {
	c := &tls.Certificate{PrivateKey: key}
	for _, x := range chain {
		c.Certificate = append(c.Certificate, x.Raw)
	}
	return c
}

func newKey() (*ecdsa.PrivateKey, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

// within gives the context of one call.
func (v *survey) within() (context.Context, context.CancelFunc) {
	return context.WithTimeout(v.ctx, patience)
}

// ownID is an ID in the server's trust domain, unlike that of any other run.
func (v *survey) ownID() string {
	return fmt.Sprintf("spiffe://%s/conform/%x", v.td, time.Now().UnixNano())
}

// wireID splits an ID for the wire.
func wireID(id string) *types.SPIFFEID {
	rest, _ := strings.CutPrefix(id, "spiffe://")
	td, path, has := strings.Cut(rest, "/")
	if has {
		path = "/" + path
	}
	return &types.SPIFFEID{TrustDomain: td, Path: path}
}

func wireText(id *types.SPIFFEID) string { return "spiffe://" + id.GetTrustDomain() + id.GetPath() }

// parseChain reads the chain of an answer.
func parseChain(s *types.X509SVID) ([]*x509.Certificate, error) {
	return x509.ParseCertificates(slices.Concat(s.GetCertChain()...))
}
