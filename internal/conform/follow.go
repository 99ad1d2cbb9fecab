package conform

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// relationMusts are the demands on what a federation is configured with,
// followMusts those on how its endpoint is followed.
var (
	relationMusts   = []int{8, 83, 85, 87}
	followMusts     = []int{18, 22, 29, 30, 31, 32, 33, 38, 39, 72, 76, 77, 79, 82, 86, 91, 92, 94, 95}
	federationMusts = slices.Concat(relationMusts, followMusts, []int{88})
)

// A relation is a federation on the wire.
type relation = types.FederationRelationship

func web() *types.FederationRelationship_HttpsWeb {
	return &types.FederationRelationship_HttpsWeb{HttpsWeb: &types.HTTPSWebProfile{}}
}

func proven(by string) *types.FederationRelationship_HttpsSpiffe {
	return &types.FederationRelationship_HttpsSpiffe{HttpsSpiffe: &types.HTTPSSPIFFEProfile{EndpointSpiffeId: by}}
}

// federate makes a federation by call.
func (v *survey) federate(r *relation) error {
	ctx, cancel := v.within()
	defer cancel()
	got, err := trustdomainv1.NewTrustDomainClient(v.admin).BatchCreateFederationRelationship(ctx,
		&trustdomainv1.BatchCreateFederationRelationshipRequest{FederationRelationships: []*relation{r}})
	if err != nil {
		return err
	}
	if len(got.Results) != 1 {
		return fmt.Errorf("%d results for one request", len(got.Results))
	}
	if st := got.Results[0].GetStatus(); st.GetCode() != 0 {
		return status.Error(codes.Code(st.Code), st.Message) //nolint:gosec // a small number
	}
	return nil
}

// part takes a federation away, with the bundle.
func (v *survey) part(td string) {
	ctx, cancel := v.within()
	defer cancel()
	_, _ = trustdomainv1.NewTrustDomainClient(v.admin).BatchDeleteFederationRelationship(ctx,
		&trustdomainv1.BatchDeleteFederationRelationshipRequest{TrustDomains: []string{td}})
	_, _ = bundlev1.NewBundleClient(v.admin).BatchDeleteFederatedBundle(ctx,
		&bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: []string{td}, Mode: bundlev1.BatchDeleteFederatedBundleRequest_DISSOCIATE})
}

// relations makes federations that are right and wrong, and takes them away.
// It reports whether the server takes any by call.
func (v *survey) relations() bool {
	td := fmt.Sprintf("web-%x.conform.example", time.Now().UnixNano())
	const url = "https://conform.example:8443"
	err := v.federate(&relation{TrustDomain: td, BundleEndpointUrl: url, BundleEndpointProfile: web()})
	if err != nil {
		v.skip("this server takes no federation by call: "+status.Convert(err).Message(), relationMusts...)
		return false
	}
	v.part(td)
	v.say("a federation of the profile https_web", nil, 83)
	err = v.federate(&relation{TrustDomain: "192.0.2.1", BundleEndpointUrl: url, BundleEndpointProfile: web()})
	v.say("a federation with the trust domain 192.0.2.1", err, 8)
	v.part("192.0.2.1")
	for _, t := range []struct {
		must int
		name string
		r    *relation
	}{
		{85, "no trust domain", &relation{BundleEndpointUrl: url, BundleEndpointProfile: web()}},
		{85, "no URL", &relation{TrustDomain: td, BundleEndpointProfile: web()}},
		{85, "no profile", &relation{TrustDomain: td, BundleEndpointUrl: url}},
		{85, "https_spiffe without the endpoint's ID", &relation{TrustDomain: td, BundleEndpointUrl: url, BundleEndpointProfile: proven("")}},
		{87, "an http URL", &relation{TrustDomain: td, BundleEndpointUrl: "http://conform.example", BundleEndpointProfile: web()}},
		{87, "a URL with a user", &relation{TrustDomain: td, BundleEndpointUrl: "https://user@conform.example", BundleEndpointProfile: web()}},
		{87, "an http URL and https_spiffe", &relation{TrustDomain: td, BundleEndpointUrl: "http://conform.example", BundleEndpointProfile: proven("spiffe://" + td + "/endpoint")}},
	} {
		err := v.federate(t.r)
		if err == nil && t.r.TrustDomain != "" {
			v.part(t.r.TrustDomain)
		}
		v.say("a federation with "+t.name, rejected(err), t.must)
	}
	return true
}

// follow has the server follow an endpoint of the check's own, which shows it
// what it must not take.
func (v *survey) follow() {
	byCall := v.relations()
	if v.cfg.Listen == "" {
		v.skip("it takes an address at which the server reaches this check: --listen", federationMusts...)
		return
	}
	d := v.cfg.Domain
	if d == nil {
		td, err := domainName(fmt.Sprintf("liar-%x.conform.example", time.Now().UnixNano()))
		if err == nil {
			d, err = quickDomain(td)
		}
		if err != nil {
			v.say("making a trust domain", err, 82)
			return
		}
	}
	l, err := openLiar(v.cfg.Listen, d)
	if err != nil {
		v.say("listening on "+v.cfg.Listen, err, 83)
		return
	}
	defer l.close()
	err = v.federate(&relation{TrustDomain: d.td.Name(), BundleEndpointUrl: l.url, BundleEndpointProfile: proven(l.id), TrustDomainBundle: l.onWire()})
	if err == nil {
		defer v.part(d.td.Name())
	} else if v.cfg.Domain == nil {
		v.skip("this server takes no federation by call: "+status.Convert(err).Message(), federationMusts...)
		return
	}
	took, err := v.took(l)
	if status.Code(err) == codes.Unimplemented {
		v.skip("this server has no RefreshBundle, which would make it look at once", federationMusts...)
		return
	}
	v.say("a good endpoint of the profile https_spiffe", fails(took, "its bundle is not taken: %v", err), 83, 92)
	if !took {
		return
	}
	v.held(l)
	v.lieWithDocuments(l)
	v.lieWithCertificates(l)
	v.lieWithRedirects(l)
	if byCall {
		v.lieAboutOthers(l)
		v.lieToWeb(l)
	}
	v.rotate(l)
	v.empty(l)
}

// refresh has the server look at the endpoint now, and gives the bundle that it
// holds then. The error is that of the look.
func (v *survey) refresh(td string) (*types.Bundle, error) {
	ctx, cancel := v.within()
	defer cancel()
	_, err := trustdomainv1.NewTrustDomainClient(v.admin).RefreshBundle(ctx, &trustdomainv1.RefreshBundleRequest{TrustDomain: td})
	b, gerr := bundlev1.NewBundleClient(v.admin).GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: td})
	return b, errors.Join(err, gerr)
}

// took puts a fresh key into the document and reports whether the server holds
// that key after it has looked.
func (v *survey) took(l *liar) (bool, error) {
	mark := l.next()
	b, err := v.refresh(l.d.td.Name())
	return slices.ContainsFunc(b.GetJwtAuthorities(), func(k *types.JWTKey) bool { return k.KeyId == mark }), err
}

// mustTake and mustNotTake note what the server did with what the liar shows.
func (v *survey) mustTake(l *liar, what string, musts ...int) bool {
	took, err := v.took(l)
	v.say(what, fails(took, "the bundle is not taken: %v", err), musts...)
	return took
}

func (v *survey) mustNotTake(l *liar, what string, musts ...int) {
	took, _ := v.took(l)
	v.say(what, fails(!took, "the bundle is taken"), musts...)
}

// held looks at what the server made of a good document.
func (v *survey) held(l *liar) {
	b, err := v.refresh(l.d.td.Name())
	certs, cerr := authorities(b)
	what := "the bundle of " + l.d.td.Name()
	v.say(what, errors.Join(err, cerr), 86)
	v.say(what, fails(b.GetTrustDomain() == l.d.td.Name(), "it goes by the name %.100q", b.GetTrustDomain()), 86)
	v.say(what, fails(len(certs) == 1 && certs[0].Equal(l.d.root), "it is not the one certificate that was published"), 82, 86)
	for _, k := range b.GetJwtAuthorities() {
		v.say(what, fails(k.KeyId != kidNone, "it has a key whose element had no use"), 79)
		v.say(what, fails(k.KeyId != kidWIT, "it has a JWT key whose element had use wit-svid"), 76)
	}
	ctx, cancel := v.within()
	defer cancel()
	own, err := bundlev1.NewBundleClient(v.admin).GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		v.say("GetBundle", err, 82)
		return
	}
	mine, err := authorities(own)
	v.say("the server's own bundle", fails(err == nil && !slices.ContainsFunc(mine, l.d.root.Equal), "it has the authority of %s", l.d.td.Name()), 82)
}

// lieWithDocuments publishes what has to be passed over.
func (v *survey) lieWithDocuments(l *liar) {
	keys := func(doc map[string]any) []any { k, _ := doc["keys"].([]any); return k }
	more := func(e map[string]any) func(map[string]any) {
		return func(doc map[string]any) { doc["keys"] = append(keys(doc), e) }
	}
	stray, err := newKey()
	if err != nil {
		return
	}
	other, err := l.d.sign(l.d.authority("other"), nil, stray.Public(), stray)
	if err != nil {
		v.say("making a certificate", err, 39)
		return
	}
	bare := func(change map[string]any) map[string]any {
		e := jwk(stray.Public())
		for k, val := range change {
			e[k] = val
		}
		return e
	}
	for _, t := range []struct {
		must   int
		name   string
		change func(map[string]any)
	}{
		{38, "an x509-svid element without x5c", more(bare(map[string]any{"use": "x509-svid"}))},
		{38, "an x509-svid element with an empty x5c", more(bare(map[string]any{"use": "x509-svid", "x5c": []any{}}))},
		{39, "a second value of x5c", func(doc map[string]any) {
			if e, ok := keys(doc)[0].(map[string]any); ok {
				e["x5c"] = []any{b64(l.d.root.Raw), b64(other.Raw)}
			}
		}},
		{72, "an unknown parameter", func(doc map[string]any) { doc["conform_unknown"] = map[string]any{"a": []any{1}} }},
		{76, "an element of unknown kty", more(map[string]any{"kty": "CONFORM", "use": "x509-svid", "x5c": []any{b64(other.Raw)}})},
		{76, "an element of unknown use", more(bare(map[string]any{"use": "conform", "x5c": []any{b64(other.Raw)}}))},
		{79, "an element without use", more(bare(map[string]any{"x5c": []any{b64(other.Raw)}}))},
		{79, "an element whose use is in upper case", more(bare(map[string]any{"use": "X509-SVID", "x5c": []any{b64(other.Raw)}}))},
	} {
		l.show(func(s *shown) { s.change = t.change })
		if !v.mustTake(l, "a document with "+t.name, t.must) {
			continue
		}
		b, _ := v.refresh(l.d.td.Name())
		certs, _ := authorities(b)
		v.say("a document with "+t.name, fails(len(certs) == 1 && certs[0].Equal(l.d.root), "%d X.509 authorities are taken from it, one is right", len(certs)), t.must)
	}
	l.show(nil)
}

// lieWithCertificates proves the endpoint with what proves nothing.
func (v *survey) lieWithCertificates(l *liar) {
	for _, t := range l.badProofs() {
		l.show(func(s *shown) { s.cert = t.cert })
		v.mustNotTake(l, "an endpoint that shows "+t.name, t.musts...)
	}
	l.show(nil)
	v.mustTake(l, "the good endpoint, after the bad", 92)
}

// lieWithRedirects leads to places that could not be configured.
func (v *survey) lieWithRedirects(l *liar) {
	for name, to := range map[string]string{
		"an http URL": l.plain + "/", "a URL with a user": strings.Replace(l.url, "https://", "https://user@", 1) + "/direct",
		"an endpoint that proves another ID": l.otherURL + "/",
	} {
		l.show(func(s *shown) { s.redirect = to })
		v.mustNotTake(l, "a redirect to "+name, 91)
	}
	l.show(nil)
}

// lieAboutOthers is an endpoint that is not of the trust domain it serves.
func (v *survey) lieAboutOthers(l *liar) {
	td, err := domainName("guest." + l.d.td.Name())
	if err != nil {
		return
	}
	guest, err := quickDomain(td)
	if err != nil {
		return
	}
	err = v.federate(&relation{TrustDomain: td.Name(), BundleEndpointUrl: l.url, BundleEndpointProfile: proven(l.id)})
	if err != nil {
		v.skip("this server takes no endpoint of a third trust domain: "+status.Convert(err).Message(), 95)
		return
	}
	defer v.part(td.Name())
	as := &liar{d: guest, state: l.state}
	l.show(func(s *shown) { s.of = guest })
	v.mustTake(as, "an endpoint of another trust domain that is configured", 95)
	key, err := newKey()
	if err != nil {
		return
	}
	fake, err := guest.sign(guest.leaf(l.id), guest.root, key.Public(), guest.key)
	if err != nil {
		v.say("making a certificate", err, 95)
		return
	}
	l.show(func(s *shown) { s.of, s.cert = guest, pair(key, fake) })
	v.mustNotTake(as, "an endpoint that is proven by the trust domain it serves, not by its own", 95, 82)
	l.show(nil)
}

// lieToWeb is an endpoint of the profile https_web that nobody vouches for.
func (v *survey) lieToWeb(l *liar) {
	td, err := domainName("web." + l.d.td.Name())
	if err != nil {
		return
	}
	d, err := quickDomain(td)
	if err != nil || v.federate(&relation{TrustDomain: td.Name(), BundleEndpointUrl: l.url, BundleEndpointProfile: web()}) != nil {
		return
	}
	defer v.part(td.Name())
	l.show(func(s *shown) { s.of = d })
	v.mustNotTake(&liar{d: d, state: l.state}, "an https_web endpoint without a certificate of a public authority", 88)
	l.show(nil)
}

// rotate replaces the root of the endpoint's trust domain: first it publishes
// the new one, then it proves itself with it, then it takes the old one away.
func (v *survey) rotate(l *liar) {
	next, err := quickDomain(l.d.td)
	if err != nil {
		return
	}
	key, err := newKey()
	if err != nil {
		return
	}
	leaf, err := next.sign(next.leaf(l.id), next.root, key.Public(), next.key)
	if err != nil {
		v.say("making a certificate", err, 94)
		return
	}
	e := jwk(next.root.PublicKey)
	e["use"], e["x5c"] = "x509-svid", []any{b64(next.root.Raw)}
	both := func(doc map[string]any) { doc["keys"] = append(doc["keys"].([]any), e) }
	alone := func(doc map[string]any) { doc["keys"] = append([]any{e}, doc["keys"].([]any)[1:]...) }
	l.show(func(s *shown) { s.cert = pair(key, leaf) })
	v.mustNotTake(l, "a new root that was not published", 81, 92)
	l.show(func(s *shown) { s.change = both })
	v.mustTake(l, "a document with the new root", 94)
	l.show(func(s *shown) { s.change, s.cert = both, pair(key, leaf) })
	v.mustTake(l, "an endpoint proven by the new root", 94)
	l.show(func(s *shown) { s.change, s.cert = alone, pair(key, leaf) })
	v.mustTake(l, "a document without the old root", 94)
	l.show(func(s *shown) { s.change = alone })
	v.mustNotTake(l, "an endpoint proven by the old root", 94)
	l.show(func(s *shown) { s.cert = pair(key, leaf) })
	v.mustTake(l, "a document with the old root again", 94)
	l.show(nil)
}

// empty publishes no keys at all. It comes last: nothing proves the endpoint
// afterwards.
func (v *survey) empty(l *liar) {
	l.show(func(s *shown) { s.bare = true })
	l.next()
	b, _ := v.refresh(l.d.td.Name())
	v.say("a document without keys", fails(len(b.GetX509Authorities())+len(b.GetJwtAuthorities()) == 0, "%d authorities are still trusted", len(b.GetX509Authorities())), 77)
	l.show(nil)
	v.mustNotTake(l, "an endpoint whose trust domain has no authority left", 77)
}
