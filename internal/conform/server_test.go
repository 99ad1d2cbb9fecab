package conform

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"sallyport/internal/federation"
	"sallyport/internal/svid"
)

// A fake is a small SPIRE server that is right in everything but what a test
// breaks.
type fake struct {
	agentv1.UnimplementedAgentServer
	bundlev1.UnimplementedBundleServer
	entryv1.UnimplementedEntryServer
	svidv1.UnimplementedSVIDServer
	trustdomainv1.UnimplementedTrustDomainServer

	t   *testing.T
	d   *Domain
	bad faults

	mu        sync.Mutex // guards what follows
	followers map[string]*federation.Follower
	relations map[string]federation.Relationship
	entries   map[string]string // IDs by the ID of the entry
}

// faults are what is broken.
type faults struct {
	// leaf changes each certificate before it is signed.
	leaf func(*x509.Certificate)
	// credulous signs whatever name a request has; csr trusts its signature.
	credulous, csr bool
	// header and claims change each token.
	header, claims map[string]any
	// document changes what is published.
	document func(map[string]any)
	// anybody takes every client certificate, old every version of TLS.
	anybody, old bool
	// wantsCert demands a client certificate of whoever reads the bundle.
	wantsCert bool
	// follow replaces how a bundle endpoint is looked at.
	follow func(f *fake, r federation.Relationship) (*federation.Bundle, error)
	// relation takes every federation.
	relation bool
}

func (f *fake) chain(id string, pub crypto.PublicKey, change func(*x509.Certificate)) *types.X509SVID {
	tpl := f.d.leaf(id)
	if change != nil {
		change(tpl)
	}
	if f.bad.leaf != nil {
		f.bad.leaf(tpl)
	}
	c, err := f.d.sign(tpl, f.d.root, pub, f.d.key)
	if err != nil {
		f.t.Error(err)
		return nil
	}
	return &types.X509SVID{CertChain: [][]byte{c.Raw}, Id: wireID(id)}
}

// requested reads a request as far as the fake believes it.
func (f *fake) requested(der []byte) (crypto.PublicKey, []string, error) {
	csr, err := x509.ParseCertificateRequest(der)
	if err == nil && !f.bad.csr {
		err = csr.CheckSignature()
	}
	if err != nil {
		return nil, nil, status.Error(codes.InvalidArgument, "no request")
	}
	uris, err := svid.URINames(&x509.Certificate{Extensions: csr.Extensions})
	if err != nil {
		return nil, nil, status.Error(codes.InvalidArgument, "no name")
	}
	return csr.PublicKey, uris, nil
}

func (f *fake) MintX509SVID(_ context.Context, r *svidv1.MintX509SVIDRequest) (*svidv1.MintX509SVIDResponse, error) {
	key, uris, err := f.requested(r.Csr)
	if err != nil {
		return nil, err
	}
	if f.bad.credulous {
		return &svidv1.MintX509SVIDResponse{Svid: f.chain("x", key, func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{uriNames(true, uris...)}
		})}, nil
	}
	if len(uris) != 1 || len(nameFaults(uris[0])) > 0 || !hasPath(uris[0]) || domainOf(uris[0]) != f.d.td.IDString() {
		return nil, status.Error(codes.InvalidArgument, "one ID")
	}
	return &svidv1.MintX509SVIDResponse{Svid: f.chain(uris[0], key, nil)}, nil
}

func (f *fake) jwt(id *types.SPIFFEID, aud []string) (*types.JWTSVID, error) {
	text := wireText(id)
	if len(aud) == 0 || (len(nameFaults(text)) > 0 || !hasPath(text) || domainOf(text) != f.d.td.IDString()) && !f.bad.credulous {
		return nil, status.Error(codes.InvalidArgument, "one ID, an audience")
	}
	g := &forger{d: f.d, now: time.Now()}
	claims := map[string]any{"sub": text, "aud": aud}
	for k, v := range f.bad.claims {
		claims[k] = v
	}
	return &types.JWTSVID{Token: g.es(f.bad.header, claims), Id: id}, nil
}

func (f *fake) MintJWTSVID(_ context.Context, r *svidv1.MintJWTSVIDRequest) (*svidv1.MintJWTSVIDResponse, error) {
	s, err := f.jwt(r.Id, r.Audience)
	return &svidv1.MintJWTSVIDResponse{Svid: s}, err
}

func (f *fake) CreateJoinToken(context.Context, *agentv1.CreateJoinTokenRequest) (*types.JoinToken, error) {
	return &types.JoinToken{Value: "token"}, nil
}

func (f *fake) AttestAgent(s grpc.BidiStreamingServer[agentv1.AttestAgentRequest, agentv1.AttestAgentResponse]) error {
	r, err := s.Recv()
	if err != nil {
		return err
	}
	key, _, err := f.requested(r.GetParams().GetParams().GetCsr())
	if err != nil {
		return err
	}
	return s.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Result_{Result: &agentv1.AttestAgentResponse_Result{
		Svid: f.chain(f.d.id("/spire/agent/join_token/token"), key, nil),
	}}})
}

func (f *fake) BatchCreateEntry(_ context.Context, r *entryv1.BatchCreateEntryRequest) (*entryv1.BatchCreateEntryResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.entries["e"] = wireText(r.Entries[0].SpiffeId)
	return &entryv1.BatchCreateEntryResponse{Results: []*entryv1.BatchCreateEntryResponse_Result{{Status: &types.Status{}, Entry: &types.Entry{Id: "e"}}}}, nil
}

func (f *fake) BatchDeleteEntry(context.Context, *entryv1.BatchDeleteEntryRequest) (*entryv1.BatchDeleteEntryResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.entries, "e")
	return &entryv1.BatchDeleteEntryResponse{}, nil
}

func (f *fake) entry(id string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.entries[id]
}

func (f *fake) BatchNewX509SVID(_ context.Context, r *svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
	key, uris, err := f.requested(r.Params[0].Csr)
	if err != nil {
		return nil, err
	}
	id := f.entry(r.Params[0].EntryId)
	if f.bad.credulous && len(uris) > 0 {
		id = uris[0]
	}
	return &svidv1.BatchNewX509SVIDResponse{Results: []*svidv1.BatchNewX509SVIDResponse_Result{{Status: &types.Status{}, Svid: f.chain(id, key, nil)}}}, nil
}

func (f *fake) NewJWTSVID(_ context.Context, r *svidv1.NewJWTSVIDRequest) (*svidv1.NewJWTSVIDResponse, error) {
	s, err := f.jwt(wireID(f.entry(r.EntryId)), r.Audience)
	return &svidv1.NewJWTSVIDResponse{Svid: s}, err
}

func (f *fake) GetBundle(context.Context, *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	b := &types.Bundle{TrustDomain: f.d.td.Name(), X509Authorities: []*types.X509Certificate{{Asn1: f.d.root.Raw}}}
	for _, kid := range []string{kidES256, kidES384} {
		der, err := x509.MarshalPKIXPublicKey(f.d.jwt[kid].Public())
		if err != nil {
			return nil, err
		}
		b.JwtAuthorities = append(b.JwtAuthorities, &types.JWTKey{KeyId: kid, PublicKey: der})
	}
	return b, nil
}

func (f *fake) BatchCreateFederationRelationship(_ context.Context, r *trustdomainv1.BatchCreateFederationRelationshipRequest) (*trustdomainv1.BatchCreateFederationRelationshipResponse, error) {
	out := &trustdomainv1.BatchCreateFederationRelationshipResponse{}
	for _, w := range r.FederationRelationships {
		st := &types.Status{}
		if err := f.relate(w); err != nil {
			st.Code, st.Message = int32(codes.InvalidArgument), err.Error()
		}
		out.Results = append(out.Results, &trustdomainv1.BatchCreateFederationRelationshipResponse_Result{Status: st})
	}
	return out, nil
}

func (f *fake) relate(w *relation) error {
	r := federation.Relationship{URL: w.BundleEndpointUrl}
	r.TrustDomain, _ = spiffeid.TrustDomainFromString(w.TrustDomain)
	switch p := w.BundleEndpointProfile.(type) {
	case *types.FederationRelationship_HttpsWeb:
		r.Profile = federation.ProfileWeb
	case *types.FederationRelationship_HttpsSpiffe:
		r.Profile = federation.ProfileSPIFFE
		r.EndpointID, _ = spiffeid.FromString(p.HttpsSpiffe.EndpointSpiffeId)
	}
	if err := r.Validate(); err != nil {
		if f.bad.relation {
			return nil
		}
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	cfg := federation.FollowerConfig{
		Relationships: []federation.Relationship{r}, Own: f.d.td, Log: slog.New(slog.DiscardHandler), WebRoots: x509.NewCertPool(),
		OwnBundle: func() *x509bundle.Bundle { return x509bundle.New(f.d.td) }, Start: map[spiffeid.TrustDomain]*federation.Bundle{},
	}
	if b := w.TrustDomainBundle; b != nil {
		certs, err := authorities(b)
		if err != nil {
			return err
		}
		cfg.Start[r.TrustDomain] = &federation.Bundle{TrustDomain: r.TrustDomain, X509: certs}
	}
	if td := r.EndpointID.TrustDomain(); !td.IsZero() && td != r.TrustDomain {
		other := f.followers[td.Name()]
		if other == nil {
			return fmt.Errorf("%s is not federated", td)
		}
		cfg.Start[td] = other.Bundle(td)
		cfg.Relationships = append(cfg.Relationships, f.relations[td.Name()])
	}
	fo, err := federation.NewFollower(cfg)
	if err != nil {
		return err
	}
	f.followers[r.TrustDomain.Name()], f.relations[r.TrustDomain.Name()] = fo, r
	return nil
}

func (f *fake) BatchDeleteFederationRelationship(_ context.Context, r *trustdomainv1.BatchDeleteFederationRelationshipRequest) (*trustdomainv1.BatchDeleteFederationRelationshipResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, td := range r.TrustDomains {
		delete(f.followers, td)
		delete(f.relations, td)
	}
	return &trustdomainv1.BatchDeleteFederationRelationshipResponse{}, nil
}

func (f *fake) BatchDeleteFederatedBundle(context.Context, *bundlev1.BatchDeleteFederatedBundleRequest) (*bundlev1.BatchDeleteFederatedBundleResponse, error) {
	return &bundlev1.BatchDeleteFederatedBundleResponse{}, nil
}

var errNone = status.Error(codes.NotFound, "no such federation")

func (f *fake) find(td string) (*federation.Follower, federation.Relationship, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fo := f.followers[td]
	if fo == nil {
		return nil, federation.Relationship{}, errNone
	}
	return fo, f.relations[td], nil
}

func (f *fake) RefreshBundle(ctx context.Context, r *trustdomainv1.RefreshBundleRequest) (*emptypb.Empty, error) {
	fo, rel, err := f.find(r.TrustDomain)
	if err != nil {
		return nil, err
	}
	if err := fo.Refresh(ctx, rel); err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return &emptypb.Empty{}, nil
}

func (f *fake) GetFederatedBundle(_ context.Context, r *bundlev1.GetFederatedBundleRequest) (*types.Bundle, error) {
	fo, rel, err := f.find(r.TrustDomain)
	if err != nil {
		return nil, err
	}
	b := fo.Bundle(rel.TrustDomain)
	if f.bad.follow != nil {
		if b, err = f.bad.follow(f, rel); err != nil {
			return nil, errNone
		}
	}
	if b == nil {
		return nil, errNone
	}
	out := &types.Bundle{TrustDomain: rel.TrustDomain.Name()}
	for _, c := range b.X509 {
		out.X509Authorities = append(out.X509Authorities, &types.X509Certificate{Asn1: c.Raw})
	}
	for _, k := range b.JWT {
		out.JwtAuthorities = append(out.JwtAuthorities, &types.JWTKey{KeyId: k.ID})
	}
	return out, nil
}

// start serves the fake and says how to look at it.
func start(t *testing.T, bad faults) Server {
	t.Helper()
	d, err := quickDomain(spiffeid.RequireTrustDomainFromString("corp.example"))
	if err != nil {
		t.Fatal(err)
	}
	f := &fake{t: t, d: d, bad: bad, followers: map[string]*federation.Follower{}, relations: map[string]federation.Relationship{}, entries: map[string]string{}}
	key, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	certs, err := parseChain(f.chain(d.id("/spire/server"), key.Public(), nil))
	if err != nil {
		t.Fatal(err)
	}
	cert := *pair(key, certs...)
	check := func(cs tls.ConnectionState) error {
		if len(cs.PeerCertificates) == 0 || bad.anybody {
			return nil
		}
		_, err := svid.VerifyChain(cs.PeerCertificates, x509bundle.FromX509Authorities(d.td, []*x509.Certificate{d.root}), time.Now())
		return err
	}
	creds := credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequestClientCert, VerifyConnection: check})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "s")
	un, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	for _, door := range []struct {
		l net.Listener
		s *grpc.Server
	}{{ln, grpc.NewServer(grpc.Creds(creds))}, {un, grpc.NewServer()}} {
		agentv1.RegisterAgentServer(door.s, f)
		bundlev1.RegisterBundleServer(door.s, f)
		entryv1.RegisterEntryServer(door.s, f)
		svidv1.RegisterSVIDServer(door.s, f)
		trustdomainv1.RegisterTrustDomainServer(door.s, f)
		go door.s.Serve(door.l) //nolint:errcheck // ends with Stop
		t.Cleanup(door.s.Stop)
	}
	h := &http.ServeMux{}
	var srv *httptest.Server
	h.HandleFunc("/{$}", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(f.published()) })
	h.HandleFunc("/.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":%q,"id_token_signing_alg_values_supported":["ES256","RS256"]}`, srv.URL, srv.URL+"/keys")
	})
	h.HandleFunc("/keys", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write(d.document(func(doc map[string]any) { doc["keys"] = doc["keys"].([]any)[1:] }))
	})
	srv = httptest.NewUnstartedServer(h)
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.TLS = federation.ServerTLS(nil)
	if bad.old {
		srv.TLS.MinVersion, srv.TLS.CipherSuites = tls.VersionTLS10, nil
	}
	if bad.wantsCert {
		srv.TLS.ClientAuth = tls.RequireAnyClientCert
	}
	srv.TLS.Certificates = []tls.Certificate{cert}
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return Server{Address: ln.Addr().String(), Operator: path, BundleEndpoint: srv.URL + "/", OIDC: srv.URL, Listen: "127.0.0.1:0"}
}

func (f *fake) published() []byte {
	return f.d.document(func(doc map[string]any) {
		keys, _ := doc["keys"].([]any)
		doc["keys"] = slices.DeleteFunc(keys, func(k any) bool {
			e, _ := k.(map[string]any)
			return e["kid"] == kidWIT || e["kid"] == kidNone
		})
		if f.bad.document != nil {
			f.bad.document(doc)
		}
	})
}

func TestARightServerConforms(t *testing.T) {
	got, err := RunServer(t.Context(), start(t, faults{}))
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range got {
		if v.Err != nil {
			t.Errorf("%d %s: %v", v.Must.Number, v.Must.Says, v.Err)
		}
		if v.Looks == 0 && slices.Contains(v.Must.Forms, ServerForm) && v.Must.Number != 88 {
			t.Errorf("%d %s: not looked at: %s", v.Must.Number, v.Must.Says, v.Skipped)
		}
	}
}

// believing looks at an endpoint as it likes and takes what it gets.
func believing(change func(map[string]any)) func(*fake, federation.Relationship) (*federation.Bundle, error) {
	return func(f *fake, r federation.Relationship) (*federation.Bundle, error) {
		tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}
		resp, err := (&http.Client{Transport: tr}).Get(r.URL)
		if err != nil {
			return nil, err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			return nil, err
		}
		if change != nil {
			var doc map[string]any
			if err := json.Unmarshal(body, &doc); err != nil {
				return nil, err
			}
			change(doc)
			if body, err = json.Marshal(doc); err != nil {
				return nil, err
			}
		}
		return federation.Decode(r.TrustDomain, body)
	}
}

// TestWhatIsBrokenIsFoundUnderItsNumber breaks one thing at a time. Each must
// be found under every number that stands with it.
func TestWhatIsBrokenIsFoundUnderItsNumber(t *testing.T) {
	keys := func(doc map[string]any) []map[string]any {
		var out []map[string]any
		for _, k := range doc["keys"].([]any) {
			out = append(out, k.(map[string]any))
		}
		return out
	}
	for name, tt := range map[string]struct {
		bad  faults
		want []int
	}{
		"signs any name":                       {faults{credulous: true}, []int{1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 15, 17, 19, 45}},
		"does not check a request's signature": {faults{csr: true}, []int{15}},
		"two names in each leaf": {faults{leaf: func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{uriNames(true, "spiffe://corp.example/a", "spiffe://corp.example/b")}
		}}, []int{17}},
		"a subject that is empty": {faults{leaf: func(c *x509.Certificate) {
			c.Subject = pkix.Name{}
			c.ExtraExtensions[0].Critical = false
		}}, []int{20}},
		"leaves that are CAs":           {faults{leaf: func(c *x509.Certificate) { c.IsCA = true }}, []int{23}},
		"leaves without key usage":      {faults{leaf: func(c *x509.Certificate) { c.KeyUsage = 0 }}, []int{24, 26}},
		"leaves that may sign":          {faults{leaf: func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }}, []int{27}},
		"leaves for clients alone":      {faults{leaf: func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] }}, []int{28}},
		"leaves that have expired":      {faults{leaf: func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }}, []int{29, 81}},
		"lets in any client":            {faults{anybody: true}, []int{22, 29, 82}},
		"a header jku":                  {faults{header: map[string]any{"jku": "https://x"}}, []int{41}},
		"a typ of its own":              {faults{header: map[string]any{"typ": "corp"}}, []int{44}},
		"no kid in tokens":              {faults{header: map[string]any{"kid": nil}}, []int{53, 81}},
		"an alg of its own":             {faults{header: map[string]any{"alg": "HS256"}}, []int{42}},
		"tokens without exp":            {faults{claims: map[string]any{"exp": nil}}, []int{49}},
		"tokens without aud":            {faults{claims: map[string]any{"aud": nil}}, []int{46}},
		"tokens for another":            {faults{claims: map[string]any{"sub": "spiffe://corp.example/other"}}, []int{45}},
		"a document without keys":       {faults{document: func(d map[string]any) { delete(d, "keys") }}, []int{75}},
		"a sequence that is text":       {faults{document: func(d map[string]any) { d["spiffe_sequence"] = "1" }}, []int{73}},
		"a hint with a point":           {faults{document: func(d map[string]any) { d["spiffe_refresh_hint"] = 1.5 }}, []int{74}},
		"a CA with a kid":               {faults{document: func(d map[string]any) { keys(d)[0]["kid"] = "x" }}, []int{35}},
		"a CA with use sig":             {faults{document: func(d map[string]any) { keys(d)[0]["use"] = "sig" }}, []int{34}},
		"a CA twice in x5c":             {faults{document: func(d map[string]any) { e := keys(d)[0]; e["x5c"] = append(e["x5c"].([]any), e["x5c"].([]any)[0]) }}, []int{37}},
		"a CA in base64url":             {faults{document: func(d map[string]any) { keys(d)[0]["x5c"] = []any{"_-8"} }}, []int{36}},
		"no use":                        {faults{document: func(d map[string]any) { delete(keys(d)[1], "use") }}, []int{52, 79}},
		"no kty":                        {faults{document: func(d map[string]any) { delete(keys(d)[1], "kty") }}, []int{78}},
		"no kid":                        {faults{document: func(d map[string]any) { delete(keys(d)[1], "kid") }}, []int{53}},
		"a key that is not yet there":   {faults{document: func(d map[string]any) { d["keys"] = d["keys"].([]any)[:1] }}, []int{81, 90}},
		"old TLS":                       {faults{old: true}, []int{84}},
		"a client certificate demanded": {faults{wantsCert: true}, []int{89, 90}},
		"takes any federation":          {faults{relation: true}, []int{85, 87}},
		"believes any endpoint":         {faults{follow: believing(nil)}, []int{18, 22, 29, 30, 31, 32, 33, 77, 81, 82, 88, 91, 92, 94, 95}},
		"takes what has no use": {faults{follow: believing(func(d map[string]any) {
			for _, k := range keys(d) {
				if k["use"] == nil || k["use"] == "X509-SVID" || k["use"] == "conform" {
					k["use"] = "x509-svid"
					if k["x5c"] == nil {
						k["use"] = "jwt-svid"
					}
				}
			}
		})}, []int{76, 79}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := RunServer(t.Context(), start(t, tt.bad))
			if err != nil {
				t.Fatal(err)
			}
			for _, must := range tt.want {
				if v := got[must-1]; v.Err == nil {
					t.Errorf("%d %s: not found (%d looks) %s", must, v.Must.Says, v.Looks, v.Skipped)
				}
			}
			var more []string
			for _, v := range got {
				if v.Err != nil && !slices.Contains(tt.want, v.Must.Number) {
					more = append(more, fmt.Sprint(v.Must.Number))
				}
			}
			t.Logf("besides %s", strings.Join(more, " "))
		})
	}
}
