// Package conform asks a running SPIFFE Workload API, ours or another's, for
// what the specifications demand, and says of each numbered demand whether it
// was met.
//
// It sees only what can be seen from outside, as the workload that it is run
// as. It holds no goroutine.
package conform

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"sallyport/internal/svid"
)

// A Verdict is about one demand.
type Verdict struct {
	// Must is its number in the list of the specifications' demands.
	Must int
	Name string
	// Err is why it was not met.
	Err error
	// Skipped is why it could not be looked at; empty when it was.
	Skipped string
}

// patience bounds each call.
const patience = 10 * time.Second

// audience is that of the JWT-SVIDs that are asked for.
const audience = "sallyport-conform"

// A probe is one run against one Workload API.
type probe struct {
	ctx    context.Context
	client workload.SpiffeWorkloadAPIClient
	out    []Verdict

	svids []*workload.X509SVID
	state *svid.State // what verifies, once it is known
	token string
}

// WorkloadAPI asks the Workload API on a Unix socket. The error says that
// nothing could be asked at all.
func WorkloadAPI(ctx context.Context, socket string) ([]Verdict, error) {
	cc, err := grpc.NewClient("unix:"+strings.TrimPrefix(socket, "unix:"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", socket, err)
	}
	defer cc.Close()
	ctx, cancel := context.WithTimeout(ctx, 6*patience)
	defer cancel()
	p := &probe{ctx: metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true"), client: workload.NewSpiffeWorkloadAPIClient(cc)}
	if err := p.x509SVIDs(); err != nil {
		return nil, fmt.Errorf("ask %s for X.509-SVIDs: %w", socket, err)
	}
	p.say(96, "the endpoint speaks gRPC", nil)
	p.say(99, "TLS is not required", nil)
	p.header(ctx)
	p.leaves()
	p.bundles()
	p.jwt()
	p.wit(cc)
	slices.SortStableFunc(p.out, func(a, b Verdict) int { return a.Must - b.Must })
	return p.out, nil
}

func (p *probe) say(must int, name string, err error) {
	p.out = append(p.out, Verdict{Must: must, Name: name, Err: err})
}

func (p *probe) skip(must int, name, why string) {
	p.out = append(p.out, Verdict{Must: must, Name: name, Skipped: why})
}

// code is an error unless err has the status code.
func code(err error, want codes.Code) error {
	if got := status.Code(err); got != want {
		return fmt.Errorf("answered %s, want %s", got, want)
	}
	return nil
}

// first is the first message of a stream.
func first[T any](ctx context.Context, open func(context.Context) (grpc.ServerStreamingClient[T], error)) (*T, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	s, err := open(ctx)
	if err != nil {
		return nil, err
	}
	return s.Recv()
}

func (p *probe) openX509(ctx context.Context) (grpc.ServerStreamingClient[workload.X509SVIDResponse], error) {
	return p.client.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
}

func (p *probe) x509SVIDs() error {
	r, err := first(p.ctx, p.openX509)
	if err != nil {
		return err
	}
	p.svids = r.Svids
	p.say(107, "the first answer comes at once", nil) // or patience had run out
	var empty, twice error
	if len(r.Svids) == 0 {
		empty = errors.New("the answer has no SVID")
	}
	hints := map[string]bool{}
	for _, s := range r.Svids {
		if s.Hint != "" && hints[s.Hint] {
			twice = fmt.Errorf("hint %.100q stands twice", s.Hint)
		}
		hints[s.Hint] = true
	}
	p.say(110, "at least one SVID", empty)
	p.say(111, "hints are unique", twice)
	return nil
}

// header asks without the security header, and with another value.
func (p *probe) header(bare context.Context) {
	for _, ctx := range []context.Context{bare, metadata.AppendToOutgoingContext(bare, "workload.spiffe.io", "false")} {
		if _, err := first(ctx, p.openX509); code(err, codes.InvalidArgument) != nil {
			p.say(98, "a request without the security header is refused", code(err, codes.InvalidArgument))
			return
		}
	}
	p.say(98, "a request without the security header is refused", nil)
}

// leaves holds each X.509-SVID to the specification.
func (p *probe) leaves() {
	var path, key error
	for _, s := range p.svids {
		err := func() error {
			certs, err := x509.ParseCertificates(s.X509Svid)
			if err != nil {
				return fmt.Errorf("x509_svid is not DER: %w", err)
			}
			roots, err := x509.ParseCertificates(s.Bundle)
			if err != nil {
				return fmt.Errorf("bundle is not DER: %w", err)
			}
			id, err := spiffeid.FromString(s.SpiffeId)
			if err != nil {
				return err
			}
			b := x509bundle.FromX509Authorities(id.TrustDomain(), roots)
			got, err := svid.VerifyChain(certs, b, time.Now())
			if err != nil {
				return err
			}
			if got != id {
				return fmt.Errorf("spiffe_id says %s, the certificate %s", id, got)
			}
			if p.state == nil {
				p.state = &svid.State{Bundle: b}
			}
			k, err := x509.ParsePKCS8PrivateKey(s.X509SvidKey)
			signer, ok := k.(crypto.Signer)
			pub, eq := certs[0].PublicKey.(interface{ Equal(crypto.PublicKey) bool })
			if err != nil || !ok || !eq || !pub.Equal(signer.Public()) {
				key = fmt.Errorf("%s: x509_svid_key is not the PKCS #8 key of the certificate", id)
			}
			return nil
		}()
		if err != nil {
			path = errors.Join(path, err)
		}
	}
	for must, name := range map[int]string{
		17: "exactly one URI name", 19: "the ID of a leaf has a path", 20: "the name is critical when the subject is empty",
		23: "the leaf is no CA, its signers are", 24: "key usage is there and critical", 26: "the leaf may sign digitally",
		27: "the leaf may not sign certificates", 28: "extended key usage has both or is absent", 29: "the path verifies",
	} {
		p.say(must, name, path)
	}
	p.say(105, "the X.509 profile gives SVIDs with their keys", errors.Join(path, key))
}

func (p *probe) bundles() {
	if p.state == nil {
		p.skip(112, "the own trust domain is in FetchX509Bundles", "no SVID verified")
		p.skip(115, "the own trust domain is in FetchJWTBundles", "no SVID verified")
		return
	}
	own := p.state.Bundle.TrustDomain()
	xs, err := first(p.ctx, func(ctx context.Context) (grpc.ServerStreamingClient[workload.X509BundlesResponse], error) {
		return p.client.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
	})
	if err == nil && len(xs.Bundles[own.IDString()]) == 0 {
		err = errors.New("it is missing")
	}
	p.say(112, "the own trust domain is in FetchX509Bundles", err)
	js, err := first(p.ctx, func(ctx context.Context) (grpc.ServerStreamingClient[workload.JWTBundlesResponse], error) {
		return p.client.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
	})
	if err == nil {
		var b *jwtbundle.Bundle
		if b, err = jwtbundle.Parse(own, js.Bundles[own.IDString()]); err == nil {
			p.state.JWTKeys = b.JWTAuthorities()
		}
	}
	p.say(115, "the own trust domain is in FetchJWTBundles", err)
}

// jwt asks for JWT-SVIDs and has them validated.
func (p *probe) jwt() {
	ctx, cancel := context.WithTimeout(p.ctx, 3*patience)
	defer cancel()
	_, err := p.client.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{})
	p.say(113, "a JWT-SVID without audience is refused", code(err, codes.InvalidArgument))
	r, err := p.client.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{audience}})
	if status.Code(err) == codes.Unimplemented {
		p.skip(117, "JWT-SVIDs", "this endpoint signs none")
		return
	}
	if err == nil && len(r.Svids) != len(p.svids) {
		err = fmt.Errorf("%d JWT-SVIDs for %d identities", len(r.Svids), len(p.svids))
	}
	p.say(114, "without spiffe_id there is one for each identity", err)
	if err != nil || p.state == nil || len(r.Svids) == 0 {
		p.skip(117, "ValidateJWTSVID", "there is no JWT-SVID")
		return
	}
	p.token = r.Svids[0].Svid
	id, _, err := p.state.VerifyJWT(p.token, audience, time.Now())
	if err == nil && id.String() != r.Svids[0].SpiffeId {
		err = fmt.Errorf("sub is %s, spiffe_id %s", id, r.Svids[0].SpiffeId)
	}
	for must, name := range map[int]string{
		40: "compact serialisation", 41: "no header beside alg, kid and typ", 42: "alg is one of the nine", 44: "typ is JWT or JOSE",
		45: "sub is the SPIFFE ID", 46: "aud is there", 49: "exp is there", 53: "its kid is in the bundle",
	} {
		p.say(must, name, err)
	}
	v, err := p.client.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: audience, Svid: p.token})
	if err == nil && v.SpiffeId != r.Svids[0].SpiffeId {
		err = fmt.Errorf("it names %s", v.SpiffeId)
	}
	p.say(117, "ValidateJWTSVID accepts a good token", err)
	_, err = p.client.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: audience + "-other", Svid: p.token})
	p.say(48, "a token for another audience is refused", code(err, codes.InvalidArgument))
	_, err = p.client.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: audience, Svid: p.token[:strings.LastIndexByte(p.token, '.')+1] + strings.Repeat("A", 86)})
	p.say(51, "a token with a wrong signature is refused", code(err, codes.InvalidArgument))
}

// wit asks for what this version of the API need not have.
func (p *probe) wit(cc *grpc.ClientConn) {
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	err := cc.Invoke(ctx, "/SpiffeWorkloadAPI/FetchWITSVID", &workload.JWTSVIDRequest{}, &workload.JWTSVIDResponse{})
	if err == nil {
		p.skip(119, "WIT-SVIDs that are not served are Unimplemented", "they are served")
		return
	}
	p.say(119, "WIT-SVIDs that are not served are Unimplemented", code(err, codes.Unimplemented))
}
