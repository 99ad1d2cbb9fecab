package conform

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"sallyport/internal/jose"
)

// A Workload says which Workload API is looked at, and how.
type Workload struct {
	// Address is that of SPIFFE_ENDPOINT_SOCKET, or the path of a Unix socket.
	// Required.
	Address string
	// Domain is a trust domain that the workload's entry federates with.
	// Without it nothing is seen of how tokens are validated.
	Domain *Domain
	// Wait is how long to wait for a second message of a stream. Default: none
	// is waited for.
	Wait time.Duration
}

// A probe is one run against one Workload API.
type probe struct {
	report
	cfg    Workload
	ctx    context.Context // with the security header
	bare   context.Context // without
	client workload.SpiffeWorkloadAPIClient
	cc     *grpc.ClientConn

	own   string // the trust domain
	svids []*workload.X509SVID
	kids  []string // of the own JWT bundle
}

// RunWorkload asks a Workload API as the workload that this process is. The
// error says that nothing could be asked at all.
func RunWorkload(ctx context.Context, w Workload) ([]Verdict, error) {
	target, err := Target(w.Address)
	if err != nil {
		return nil, err
	}
	cc, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", w.Address, err)
	}
	defer cc.Close()
	ctx, cancel := context.WithTimeout(ctx, 12*patience+w.Wait)
	defer cancel()
	p := &probe{
		report: report{form: WorkloadForm}, cfg: w, bare: ctx, cc: cc,
		ctx:    metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true"),
		client: workload.NewSpiffeWorkloadAPIClient(cc),
	}
	if err := p.x509SVIDs(); err != nil {
		return nil, fmt.Errorf("ask %s for X.509-SVIDs: %w", w.Address, err)
	}
	const by = "FetchX509SVID"
	p.say(by, nil, 96, 99, 102, 104, 107)
	if strings.HasPrefix(target, "unix:") {
		p.skip("it is asked over a Unix socket", 97)
	} else {
		p.skip("how the network binds addresses cannot be seen from here", 97)
	}
	p.header()
	p.leaves()
	p.x509Bundles()
	p.jwtBundles()
	p.tokens()
	p.validation()
	p.wit()
	p.services()
	p.whole()
	return p.verdicts(), nil
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

func (p *probe) openX509Bundles(ctx context.Context) (grpc.ServerStreamingClient[workload.X509BundlesResponse], error) {
	return p.client.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
}

func (p *probe) openJWTBundles(ctx context.Context) (grpc.ServerStreamingClient[workload.JWTBundlesResponse], error) {
	return p.client.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
}

func (p *probe) x509SVIDs() error {
	r, err := first(p.ctx, p.openX509)
	if err != nil {
		return err
	}
	p.svids = r.Svids
	const by = "FetchX509SVID"
	p.say(by, fails(len(r.Svids) > 0, "the answer has no SVID"), 110)
	hints, twice := map[string]bool{}, error(nil)
	for _, s := range r.Svids {
		if s.Hint != "" && hints[s.Hint] {
			twice = fmt.Errorf("the hint %.100q stands twice", s.Hint)
		}
		hints[s.Hint] = true
	}
	p.say(by, twice, 111)
	return nil
}

// header makes each call without the security header, and with another value.
func (p *probe) header() {
	calls := map[string]func(context.Context) error{
		"FetchX509SVID":    func(ctx context.Context) error { _, err := first(ctx, p.openX509); return err },
		"FetchX509Bundles": func(ctx context.Context) error { _, err := first(ctx, p.openX509Bundles); return err },
		"FetchJWTBundles":  func(ctx context.Context) error { _, err := first(ctx, p.openJWTBundles); return err },
		"FetchJWTSVID": func(ctx context.Context) error {
			_, err := p.client.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{audience}})
			return err
		},
		"ValidateJWTSVID": func(ctx context.Context) error {
			_, err := p.client.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: audience, Svid: "a.b.c"})
			return err
		},
	}
	for _, name := range slices.Sorted(maps.Keys(calls)) {
		for _, value := range []string{"", "false", "True"} {
			ctx, cancel := context.WithTimeout(p.bare, patience)
			if value != "" {
				ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", value)
			}
			p.say(fmt.Sprintf("%s with %q", name, value), code(calls[name](ctx), codes.InvalidArgument), 98)
			cancel()
		}
	}
}

// leaves holds each X.509-SVID to the specification.
func (p *probe) leaves() {
	for _, s := range p.svids {
		what := "the X.509-SVID of " + s.SpiffeId
		certs, err := x509.ParseCertificates(s.X509Svid)
		if err != nil {
			p.say(what, fmt.Errorf("x509_svid is not DER: %w", err), leafMusts...)
			continue
		}
		roots, err := x509.ParseCertificates(s.Bundle)
		if err != nil {
			p.say(what, fmt.Errorf("bundle is not DER: %w", err), 29, 109)
			continue
		}
		p.say(what, fails(len(roots) > 0, "its bundle is empty"), 14)
		if p.own == "" {
			p.own = domainOf(s.SpiffeId)
		}
		err = p.chain(what, certs, roots, s.SpiffeId)
		if err == nil {
			err = keyOf(certs, s.X509SvidKey)
		}
		p.say(what, err, 105)
	}
}

// domainOf is the trust domain of an ID, in the form of a bundle's name.
func domainOf(id string) string {
	rest, _ := strings.CutPrefix(id, "spiffe://")
	td, _, _ := strings.Cut(rest, "/")
	return "spiffe://" + td
}

// keyOf is an error unless der is the PKCS #8 key of the first certificate.
func keyOf(certs []*x509.Certificate, der []byte) error {
	k, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return errors.New("x509_svid_key is not PKCS #8")
	}
	s, ok := k.(crypto.Signer)
	pub, eq := certs[0].PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	return fails(ok && eq && pub.Equal(s.Public()), "x509_svid_key is not the key of the certificate")
}

func (p *probe) x509Bundles() {
	r, err := first(p.ctx, p.openX509Bundles)
	const by = "FetchX509Bundles"
	if err == nil && len(r.Bundles[p.own]) == 0 {
		err = fmt.Errorf("the bundle of %s is missing", p.own)
	}
	p.say(by, err, 112)
	if err != nil {
		return
	}
	for td, der := range r.Bundles {
		certs, err := x509.ParseCertificates(der)
		p.say(by, err, 109)
		for _, c := range certs {
			p.say("the bundle of "+td, p.authority(c), 109)
		}
		p.say(by, fails(td == domainOf(td), "the bundle's name %.100q is no trust domain's ID", td), 86)
	}
	if p.cfg.Domain == nil {
		return
	}
	name, root := p.cfg.Domain.td.IDString(), p.cfg.Domain.root
	certs, err := x509.ParseCertificates(r.Bundles[name])
	if err != nil || len(r.Bundles[name]) == 0 {
		p.skip("this workload does not get the bundle of "+name+": let its entry federate with it", 93)
		return
	}
	p.say("the bundle of "+name, fails(len(certs) == 1 && certs[0].Equal(root), "it is not the one certificate of %s", name), 82, 86, 93)
	own, err := x509.ParseCertificates(r.Bundles[p.own])
	p.say("the bundle of "+p.own, fails(err == nil && !slices.ContainsFunc(own, root.Equal), "it holds the authority of %s", name), 82)
}

func (p *probe) jwtBundles() {
	r, err := first(p.ctx, p.openJWTBundles)
	const by = "FetchJWTBundles"
	if status.Code(err) == codes.Unimplemented {
		p.say(by, errors.New("it is not there"), 105, 115)
		return
	}
	if err == nil && r.Bundles[p.own] == nil {
		err = fmt.Errorf("the bundle of %s is missing", p.own)
	}
	p.say(by, err, 115)
	if err != nil {
		return
	}
	p.kids = p.keySet("the JWT bundle of "+p.own, r.Bundles[p.own])
	if p.cfg.Domain == nil {
		return
	}
	name := p.cfg.Domain.td.IDString()
	doc, has := r.Bundles[name]
	if !has {
		return
	}
	kids := p.keySet("the JWT bundle of "+name, doc)
	slices.Sort(kids)
	p.say("the JWT bundle of "+name, fails(slices.Equal(kids, []string{kidES256, kidES384, kidRSA}), "it has the keys %q", kids), 82, 86, 116)
	for _, kid := range kids {
		p.say("the JWT bundle of "+p.own, fails(!slices.Contains(p.kids, kid), "it has the key %q of %s", kid, name), 82)
	}
}

// keySet holds a JWK set of the Workload API to the specification, and gives
// its key IDs. The use of a key may be left out there: all are for tokens.
func (p *probe) keySet(what string, doc []byte) (kids []string) {
	set, err := jose.ParseObject(doc)
	keys, ok := set["keys"].([]any)
	if err == nil && !ok {
		err = errors.New("keys is missing")
	}
	p.say(what, err, 115)
	for i, k := range keys {
		o, _ := k.(map[string]any)
		what := fmt.Sprintf("%s, key %d", what, i+1)
		use, has := o["use"]
		p.say(what, fails(!has || use == "jwt-svid", "its use is %.50v", use), 116)
		if has {
			p.say(what, fails(use == "jwt-svid", "its use is %.50v", use), 52)
		} else {
			p.skip("this Workload API leaves out use; sallyport conform server looks at the bundle document", 52)
		}
		kty, _ := o["kty"].(string)
		kid, _ := o["kid"].(string)
		p.say(what, fails(kty != "", "kty is missing"), 78)
		p.say(what, fails(kid != "", "kid is missing"), 53)
		p.say(what, fails(o["x5c"] == nil, "it has a certificate"), 116)
		kids = append(kids, kid)
	}
	return kids
}

// tokens asks for JWT-SVIDs.
func (p *probe) tokens() {
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	const by = "FetchJWTSVID"
	_, err := p.client.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{})
	if status.Code(err) == codes.Unimplemented {
		p.say(by, errors.New("it is not there"), 105)
		return
	}
	p.say(by+" without audience", code(err, codes.InvalidArgument), 113)
	aud := []string{audience, audience + "-2"}
	r, err := p.client.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: aud})
	p.say(by, err, 105)
	if err != nil {
		return
	}
	var ids []string
	for _, s := range r.Svids {
		ids = append(ids, s.SpiffeId)
		p.name(s.SpiffeId)
		p.jwt(s.Svid, s.SpiffeId, p.kids)
		if t, err := readToken(s.Svid); err == nil {
			got := audiences(t.claims["aud"])
			p.say(by, fails(slices.Equal(got, aud), "the token is for %q, not for %q", got, aud), 113)
		}
	}
	var all []string
	for _, s := range p.svids {
		all = append(all, s.SpiffeId)
	}
	slices.Sort(ids)
	slices.Sort(all)
	p.say(by, fails(slices.Equal(slices.Compact(ids), slices.Compact(all)), "there are tokens for %q, X.509-SVIDs for %q", ids, all), 114)
	if len(ids) > 0 {
		r, err = p.client.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: aud, SpiffeId: ids[0]})
		if err == nil {
			err = fails(len(r.Svids) == 1 && r.Svids[0].SpiffeId == ids[0], "asked for %s alone it gives %d tokens", ids[0], len(r.Svids))
		}
		p.say(by, err, 114)
	}
	for _, s := range r.GetSvids() {
		p.ownToken(ctx, s)
	}
}

// ownToken has a token validated that was given out here.
func (p *probe) ownToken(ctx context.Context, s *workload.JWTSVID) {
	validate := func(token, aud string) (string, error) {
		v, err := p.client.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: aud, Svid: token})
		return v.GetSpiffeId(), err
	}
	id, err := validate(s.Svid, audience)
	if err == nil {
		err = fails(id == s.SpiffeId, "it names %s", id)
	}
	p.say("ValidateJWTSVID of the token of "+s.SpiffeId, err, 15, 117, 118)
	no := func(must int, what, token, aud string) {
		_, err := validate(token, aud)
		p.say("ValidateJWTSVID of "+what, code(err, codes.InvalidArgument), must, 117)
	}
	no(48, "a token for another audience", s.Svid, audience+"-other")
	no(51, "a token with another signature", s.Svid[:strings.LastIndexByte(s.Svid, '.')+1]+strings.Repeat("A", 86), audience)
	no(117, "a token without naming an audience", s.Svid, "")
	no(117, "no token", "", audience)
	if parts := strings.Split(s.Svid, "."); len(parts) == 3 {
		b, _ := json.Marshal(map[string]any{"protected": parts[0], "payload": parts[1], "signature": parts[2]})
		no(40, "flattened JSON serialisation", string(b), audience)
	}
}

// validation lies to the validator, as the trust domain that it federates with.
func (p *probe) validation() {
	lied := []int{16, 43, 47, 48, 50, 54, 55}
	if p.cfg.Domain == nil {
		p.skip("it takes a trust domain that the workload federates with: --domain", slices.Concat(lied, []int{82, 86, 93})...)
		return
	}
	f := &forger{d: p.cfg.Domain, now: time.Now()}
	own := strings.TrimPrefix(p.own, "spiffe://")
	good, lies := f.truths(), f.lies(own)
	if f.err != nil {
		p.say("making tokens", f.err, 117)
		return
	}
	ask := func(token string) (string, error) {
		ctx, cancel := context.WithTimeout(p.ctx, patience)
		defer cancel()
		v, err := p.client.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: audience, Svid: token})
		return v.GetSpiffeId(), err
	}
	if _, err := ask(good["ES256"]); err != nil {
		p.skip(fmt.Sprintf("a good token of %s is refused (%.200s): let the workload's entry federate with it", f.d.td, status.Convert(err).Message()), lied...)
		return
	}
	for _, alg := range slices.Sorted(maps.Keys(good)) {
		id, err := ask(good[alg])
		if err == nil {
			err = fails(id == f.d.id("/conform"), "it names %s", id)
		}
		p.say("a good token with "+alg, err, 42, 117, 118)
	}
	for _, l := range lies {
		_, err := ask(l.token)
		musts := []int{l.must, 117}
		if l.must == 55 {
			musts = append(musts, 118, 82)
		}
		p.say(l.name+" in a token of another trust domain", code(err, codes.InvalidArgument), musts...)
	}
	long := longName(f.d.td.Name())
	id, err := ask(f.es(nil, map[string]any{"sub": long}))
	if err == nil {
		err = fails(id == long, "it names another")
	}
	p.say("a sub of 2048 bytes", err, 13)
}
