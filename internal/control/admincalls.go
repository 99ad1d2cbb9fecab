package control

import (
	"context"
	"crypto/x509"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport/internal/mesh"
)

// Entry returns one entry.
func (a *Admin) Entry(ctx context.Context, id string) (mesh.Entry, error) {
	w, err := entryv1.NewEntryClient(a.cc).GetEntry(ctx, &entryv1.GetEntryRequest{Id: id})
	if err != nil {
		return mesh.Entry{}, a.explain("show entry "+id, err)
	}
	return entryFromWire(w)
}

// CreateEntry adds an entry beside the reviewed files and returns it as it is
// kept. WeakSelectors cannot be asked for by a call.
func (a *Admin) CreateEntry(ctx context.Context, e mesh.Entry) (mesh.Entry, error) {
	const verb = "create entry"
	resp, err := entryv1.NewEntryClient(a.cc).BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{entryToWire(e, 0)}})
	if err != nil {
		return mesh.Entry{}, a.explain(verb, err)
	}
	if len(resp.GetResults()) != 1 {
		return mesh.Entry{}, fmt.Errorf("%s: %w: %d results, want one", verb, ErrFailed, len(resp.GetResults()))
	}
	res := resp.GetResults()[0]
	if err := itemError(verb, res.GetStatus()); err != nil {
		return mesh.Entry{}, err
	}
	return entryFromWire(res.GetEntry())
}

// DeleteEntry removes an entry that a call has made.
func (a *Admin) DeleteEntry(ctx context.Context, id string) error {
	verb := "delete entry " + id
	resp, err := entryv1.NewEntryClient(a.cc).BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: []string{id}})
	if err != nil {
		return a.explain(verb, err)
	}
	if len(resp.GetResults()) != 1 {
		return fmt.Errorf("%s: %w: %d results, want one", verb, ErrFailed, len(resp.GetResults()))
	}
	return itemError(verb, resp.GetResults()[0].GetStatus())
}

// itemError is the error that the status of one item of a batch stands for.
func itemError(verb string, st *types.Status) error {
	if c := codes.Code(st.GetCode()); c != codes.OK {
		return fmt.Errorf("%s: %w", verb, refusal(status.New(c, st.GetMessage())))
	}
	return nil
}

// Agent returns one attested node.
func (a *Admin) Agent(ctx context.Context, id spiffeid.ID) (mesh.Agent, error) {
	w, err := agentv1.NewAgentClient(a.cc).GetAgent(ctx, &agentv1.GetAgentRequest{Id: idToWire(id)})
	if err != nil {
		return mesh.Agent{}, a.explain("show agent "+id.String(), err)
	}
	return agentFromWire(w)
}

// BanAgent ends an agent and keeps it out.
func (a *Admin) BanAgent(ctx context.Context, id spiffeid.ID) error {
	_, err := agentv1.NewAgentClient(a.cc).BanAgent(ctx, &agentv1.BanAgentRequest{Id: idToWire(id)})
	return a.explainAny("ban agent "+id.String(), err)
}

// EvictAgent ends an agent, or its ban: it may attest again.
func (a *Admin) EvictAgent(ctx context.Context, id spiffeid.ID) error {
	_, err := agentv1.NewAgentClient(a.cc).DeleteAgent(ctx, &agentv1.DeleteAgentRequest{Id: idToWire(id)})
	return a.explainAny("evict agent "+id.String(), err)
}

func (a *Admin) explainAny(verb string, err error) error {
	if err == nil {
		return nil
	}
	return a.explain(verb, err)
}

// MintX509 has a certificate request signed that names one SPIFFE ID; the chain
// begins with the leaf. A ttl of zero is the issuer's default.
func (a *Admin) MintX509(ctx context.Context, csr []byte, ttl time.Duration) ([]*x509.Certificate, error) {
	const verb = "mint SVID"
	resp, err := svidv1.NewSVIDClient(a.cc).MintX509SVID(ctx, &svidv1.MintX509SVIDRequest{Csr: csr, Ttl: seconds(ttl)})
	if err != nil {
		return nil, a.explain(verb, err)
	}
	var chain []*x509.Certificate
	for _, der := range resp.GetSvid().GetCertChain() {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", verb, err)
		}
		chain = append(chain, c)
	}
	if len(chain) == 0 {
		return nil, fmt.Errorf("%s: %w: no certificate in the answer", verb, ErrFailed)
	}
	return chain, nil
}

// MintJWT has a token signed. A ttl of zero is the issuer's default.
func (a *Admin) MintJWT(ctx context.Context, id spiffeid.ID, audience []string, ttl time.Duration) (token string, expires time.Time, err error) {
	resp, err := svidv1.NewSVIDClient(a.cc).MintJWTSVID(ctx, &svidv1.MintJWTSVIDRequest{Id: idToWire(id), Audience: audience, Ttl: seconds(ttl)})
	if err != nil {
		return "", time.Time{}, a.explain("mint token", err)
	}
	return resp.GetSvid().GetToken(), timeOfUnix(resp.GetSvid().GetExpiresAt()), nil
}

// Bundle returns the bundle of a trust domain, which has to be the issuer's.
func (a *Admin) Bundle(ctx context.Context, td spiffeid.TrustDomain) (Bundle, error) {
	w, err := bundlev1.NewBundleClient(a.cc).GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return Bundle{}, a.explain("read bundle", err)
	}
	return bundleFromWire(w, td)
}
