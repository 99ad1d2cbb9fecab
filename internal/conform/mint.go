package conform

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport/internal/svid"
)

func domainName(name string) (spiffeid.TrustDomain, error) {
	return spiffeid.TrustDomainFromString(name)
}

// A wish is a certificate request that asks for something wrong.
type wish struct {
	must int
	name string
	uris []string
	more []pkix.Extension
}

// wishes ask for what no SVID may have. A server may refuse them or sign
// without it.
func wishes(good string) []wish {
	td := strings.TrimPrefix(domainOf(good), "spiffe://")
	out := []wish{
		{17, "two URI names", []string{good, good + "-2"}, nil},
		{17, "a SPIFFE ID and another URI", []string{good, "https://conform.example/x"}, nil},
		{17, "no URI name", nil, nil},
		{19, "an ID without path", []string{"spiffe://" + td}, nil},
		{5, "a trust domain in upper case", []string{"spiffe://" + strings.ToUpper(td) + "/conform/upper"}, nil},
		{23, "cA", []string{good}, []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}}}},
		{27, "keyCertSign and cRLSign", []string{good}, []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Critical: true, Value: []byte{3, 2, 1, 6}}}},
		{26, "keyEncipherment alone", []string{good}, []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Critical: true, Value: []byte{3, 2, 5, 0x20}}}},
		{28, "codeSigning alone", []string{good}, []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Value: []byte{0x30, 10, 6, 8, 0x2b, 6, 1, 5, 5, 7, 3, 3}}}},
	}
	for _, b := range badNames {
		out = append(out, wish{b.must, "the ID " + b.text, []string{b.of(td)}, nil})
	}
	return out
}

// request makes a certificate request with names as they are given.
func request(key *ecdsa.PrivateKey, uris []string, more ...pkix.Extension) ([]byte, error) {
	t := &x509.CertificateRequest{Subject: pkix.Name{Organization: []string{"conform"}}}
	if len(uris) > 0 {
		t.ExtraExtensions = append(t.ExtraExtensions, uriNames(false, uris...))
	}
	t.ExtraExtensions = append(t.ExtraExtensions, more...)
	return x509.CreateCertificateRequest(rand.Reader, t, key)
}

// mint asks an operator's rights for SVIDs, right and wrong.
func (v *survey) mint() {
	c := svidv1.NewSVIDClient(v.admin)
	ask := func(csr []byte) ([]*x509.Certificate, error) {
		ctx, cancel := v.within()
		defer cancel()
		r, err := c.MintX509SVID(ctx, &svidv1.MintX509SVIDRequest{Csr: csr})
		if err != nil {
			return nil, err
		}
		return parseChain(r.GetSvid())
	}
	key, err := newKey()
	if err != nil {
		return
	}
	const by = "MintX509SVID"
	id := v.ownID()
	csr, err := request(key, []string{id})
	if err != nil {
		return
	}
	chain, err := ask(csr)
	if err != nil {
		v.skip(by+" is refused: "+status.Convert(err).Message(), slices.Concat(nameMusts, leafMusts)...)
		return
	}
	_ = v.chain(by, chain, v.roots, id)
	if v.doc != nil {
		v.say(by+", by the bundle document from before", verify(chain, v.doc.x509), 81)
	}
	v.impostor(key, chain)
	for _, w := range wishes(id) {
		csr, err := request(key, w.uris, w.more...)
		if err != nil {
			v.say("making a certificate request with "+w.name, err, w.must)
			continue
		}
		chain, err := ask(csr)
		if err != nil {
			v.say(by+" with "+w.name, rejected(err), w.must)
			continue
		}
		v.say(by+" with "+w.name, v.clean(chain, w.must), w.must)
	}
	if bad := slices.Clone(csr); len(bad) > 0 {
		bad[len(bad)-1] ^= 1
		_, err := ask(bad)
		v.say(by+" of a request whose signature is wrong", rejected(err), 15)
	}
	long := longName(v.td)
	if csr, err := request(key, []string{long}); err == nil {
		chain, err := ask(csr)
		if err == nil {
			err = v.clean(chain, 13)
		}
		v.say(by+" of an ID of 2048 bytes", err, 13)
	}
}

// clean reports whether a certificate that came of a wrong request is right in
// what the request had wrong; the rest is looked at elsewhere.
func (v *survey) clean(chain []*x509.Certificate, must int) error {
	var r report
	_ = r.chain("it", chain, v.roots, "")
	if err := errors.Join(r.errs[must]...); err != nil {
		return fmt.Errorf("a certificate is signed that is wrong: %w", err)
	}
	uris, err := svid.URINames(chain[0])
	if err != nil || len(uris) != 1 {
		return fmt.Errorf("a certificate is signed with %d URI names: %w", len(uris), err)
	}
	return fails(domainOf(uris[0]) == "spiffe://"+v.td, "a certificate is signed for %s", uris[0])
}

// impostor shows the server what a workload could sign with its own SVID.
func (v *survey) impostor(key *ecdsa.PrivateKey, chain []*x509.Certificate) {
	cc, _, err := v.dial(pair(key, chain...))
	if err != nil {
		return // this server lets no workload in, so a refusal shows nothing
	}
	cc.Close()
	td, err := domainName(v.td)
	if err != nil {
		return
	}
	d := &Domain{td: td}
	sub, err := newKey()
	if err != nil {
		return
	}
	leaf, err := d.sign(d.leaf(d.id("/spire/agent/join_token/conform")), chain[0], sub.Public(), key)
	if err != nil {
		v.say("making a certificate", err, 29)
		return
	}
	v.refused("a certificate that a workload signed with its own SVID", pair(sub, append([]*x509.Certificate{leaf}, chain...)...), 29)
}

// mintToken asks for JWT-SVIDs, right and wrong.
func (v *survey) mintToken() {
	c := svidv1.NewSVIDClient(v.admin)
	const by = "MintJWTSVID"
	ask := func(id *types.SPIFFEID, aud ...string) (*types.JWTSVID, error) {
		ctx, cancel := v.within()
		defer cancel()
		r, err := c.MintJWTSVID(ctx, &svidv1.MintJWTSVIDRequest{Id: id, Audience: aud})
		return r.GetSvid(), err
	}
	id := v.ownID()
	t, err := ask(wireID(id), audience)
	if err != nil {
		v.skip(by+" is refused: "+status.Convert(err).Message(), tokenMusts...)
		return
	}
	v.signed(by, t, id)
	_, err = ask(wireID(id))
	v.say(by+" without audience", rejected(err), 46)
	for _, b := range badNames {
		text := b.of(v.td)
		if !strings.HasPrefix(text, "spiffe://") {
			continue // the wire has no scheme
		}
		if t, err = ask(wireID(text), audience); err != nil {
			v.say(by+" for "+b.text, rejected(err), b.must)
			continue
		}
		bad := nameFaults(wireText(t.GetId()))
		v.say(by+" for "+b.text, bad[b.must], b.must)
	}
	_, err = ask(wireID("spiffe://"+v.td), audience)
	v.say(by+" for an ID without path", rejected(err), 45)
}

// signed holds a token of the server to the specification.
func (v *survey) signed(by string, t *types.JWTSVID, id string) {
	v.say(by, fails(wireText(t.GetId()) == id, "it is for %s, not for %s", wireText(t.GetId()), id), 45)
	v.name(wireText(t.GetId()))
	v.jwt(t.GetToken(), id, v.kids)
	if v.doc == nil {
		return
	}
	if read, err := readToken(t.GetToken()); err == nil {
		kid, _ := read.header["kid"].(string)
		v.say(by+", by the bundle document from before", fails(slices.Contains(v.doc.kids, kid), "it has no key %.50q", kid), 81)
	}
}

// node attests one, and asks for the SVIDs of an entry as it.
func (v *survey) node() {
	token := v.cfg.JoinToken
	if token == "" && v.admin != nil {
		ctx, cancel := v.within()
		defer cancel()
		if t, err := agentv1.NewAgentClient(v.admin).CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: 60}); err == nil {
			token = t.GetValue()
		}
	}
	if token == "" {
		return // what is minted shows the same demands
	}
	key, err := newKey()
	if err != nil {
		return
	}
	chain, id, err := v.attest(token, key)
	if err != nil {
		v.say("AttestAgent with a join token", err, 17)
		return
	}
	_ = v.chain("AttestAgent", chain, v.roots, id)
	cc, _, err := v.dial(pair(key, chain...))
	if err != nil {
		v.say("a node's own SVID", err, 29)
		return
	}
	defer cc.Close()
	v.entry(cc, id)
	if v.admin != nil {
		ctx, cancel := v.within()
		defer cancel()
		_, _ = agentv1.NewAgentClient(v.admin).DeleteAgent(ctx, &agentv1.DeleteAgentRequest{Id: wireID(id)})
	}
}

// attest joins as a node.
func (v *survey) attest(token string, key *ecdsa.PrivateKey) ([]*x509.Certificate, string, error) {
	csr, err := request(key, nil)
	if err != nil {
		return nil, "", err
	}
	cc, _, err := v.dial(nil)
	if err != nil {
		return nil, "", err
	}
	defer cc.Close()
	ctx, cancel := v.within()
	defer cancel()
	s, err := agentv1.NewAgentClient(cc).AttestAgent(ctx)
	if err != nil {
		return nil, "", err
	}
	err = s.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data: &types.AttestationData{Type: "join_token", Payload: []byte(token)}, Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	}}})
	if err != nil {
		return nil, "", err
	}
	r, err := s.Recv()
	if err != nil {
		return nil, "", err
	}
	chain, err := parseChain(r.GetResult().GetSvid())
	return chain, wireText(r.GetResult().GetSvid().GetId()), err
}

// entry makes one for the node and fetches its SVIDs with requests that name
// somebody else: identity never comes from the request.
func (v *survey) entry(node *grpc.ClientConn, parent string) {
	if v.admin == nil {
		return
	}
	id := v.ownID()
	ctx, cancel := v.within()
	defer cancel()
	entries := entryv1.NewEntryClient(v.admin)
	r, err := entries.BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{{
		SpiffeId: wireID(id), ParentId: wireID(parent), Selectors: []*types.Selector{{Type: "unix", Value: "uid:4294967294"}},
	}}})
	if err != nil || len(r.GetResults()) != 1 || r.Results[0].GetStatus().GetCode() != int32(codes.OK) {
		return // this server's entries come from elsewhere
	}
	entryID := r.Results[0].GetEntry().GetId()
	defer func() {
		ctx, cancel := v.within()
		defer cancel()
		_, _ = entries.BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: []string{entryID}})
	}()
	key, err := newKey()
	if err != nil {
		return
	}
	c := svidv1.NewSVIDClient(node)
	for _, w := range append(wishes("spiffe://"+v.td+"/admin"), wish{15, "another identity", []string{"spiffe://" + v.td + "/admin"}, nil}) {
		csr, err := request(key, w.uris, w.more...)
		if err != nil {
			continue
		}
		ctx, cancel := v.within()
		got, err := c.BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: entryID, Csr: csr}}})
		cancel()
		what := "BatchNewX509SVID with " + w.name
		switch {
		case err != nil:
			v.say(what, rejected(err), w.must)
		case len(got.Results) != 1:
			v.say(what, fmt.Errorf("%d results for one request", len(got.Results)), w.must)
		case got.Results[0].GetStatus().GetCode() != 0:
			v.say(what, rejected(status.Error(codes.Code(got.Results[0].Status.Code), "")), w.must) //nolint:gosec // a small number
		default:
			chain, err := parseChain(got.Results[0].GetSvid())
			if err == nil {
				_ = v.chain("BatchNewX509SVID", chain, v.roots, id)
				err = v.clean(chain, w.must)
			}
			v.say(what, err, w.must)
		}
	}
	ctx, cancel = v.within()
	defer cancel()
	t, err := c.NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{EntryId: entryID, Audience: []string{audience}})
	if err != nil {
		v.say("NewJWTSVID", err, 45)
		return
	}
	v.signed("NewJWTSVID", t.GetSvid(), id)
}
