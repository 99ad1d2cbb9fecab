package svid

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"sallyport/internal/jose"
)

// jwtSVID is what JWT-SVID section 2 lets a token look like.
var jwtSVID = jose.Profile{
	Algs: []string{
		jose.ES256, jose.ES384, jose.ES512, jose.RS256, jose.RS384, jose.RS512,
		jose.PS256, jose.PS384, jose.PS512,
	},
	Types:     []string{"", "JWT", "JOSE"},
	NeedKeyID: true,
}

// VerifyJWT checks a JWT-SVID of the state's trust domain or a federated one,
// addressed to audience, and gives its subject and claims. Only keys of the
// subject's own trust domain count. It refuses more than go-spiffe
// does: any header beside alg, kid and typ, duplicate names, a token without
// audience whoever asks, a subject without path, numbers that overflow time.
func (st *State) VerifyJWT(token, audience string, now time.Time) (spiffeid.ID, map[string]any, error) {
	id, claims, err := st.verifyJWT(token, audience, now)
	if err != nil {
		return spiffeid.ID{}, nil, fmt.Errorf("verify JWT-SVID: %w", err)
	}
	return id, claims, nil
}

func (st *State) verifyJWT(token, audience string, now time.Time) (spiffeid.ID, map[string]any, error) {
	t, err := jwtSVID.Parse(token)
	if err != nil {
		return spiffeid.ID{}, nil, err
	}
	// The subject is not believed yet: it only chooses the keys.
	sub, _ := t.Claims["sub"].(string)
	id, err := spiffeid.FromString(sub)
	if err != nil {
		return spiffeid.ID{}, nil, errors.New("sub is not a SPIFFE ID")
	}
	keys := st.JWTKeys
	if id.TrustDomain() != st.Bundle.TrustDomain() {
		if keys = st.FederatedJWT[id.TrustDomain()]; len(keys) == 0 {
			return spiffeid.ID{}, nil, fmt.Errorf("no bundle for trust domain %s", id.TrustDomain())
		}
	}
	key, ok := keys[t.KeyID]
	if !ok {
		return spiffeid.ID{}, nil, errors.New("no key of the bundle has this key ID")
	}
	if err := t.Verify(jose.Key{ID: t.KeyID, Public: key}); err != nil {
		return spiffeid.ID{}, nil, err
	}
	if audience == "" {
		return spiffeid.ID{}, nil, errors.New("no audience to check against")
	}
	if _, err := t.Check(jose.Claims{Now: now, Audiences: []string{audience}}); errors.Is(err, jose.ErrExpired) {
		return spiffeid.ID{}, nil, fmt.Errorf("token: %w", ErrExpired)
	} else if err != nil {
		return spiffeid.ID{}, nil, err
	}
	if id.Path() == "" || len(sub) > maxID {
		return spiffeid.ID{}, nil, errors.New("sub has no path or is too long")
	}
	return id, t.Claims, nil
}

// ValidateJWTSVID checks a token for a workload that cannot do so itself.
func (w *WorkloadAPI) ValidateJWTSVID(ctx context.Context, r *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	if r.Audience == "" || r.Svid == "" {
		return nil, status.Error(codes.InvalidArgument, "audience and svid must be given")
	}
	g, err := w.attest(ctx, "ValidateJWTSVID", spiffeid.ID{})
	if err != nil {
		return nil, err
	}
	id, claims, err := g.state.VerifyJWT(r.Svid, r.Audience, w.cfg.Source.now())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if td := id.TrustDomain(); td != g.state.Bundle.TrustDomain() && g.federated()[td] == nil {
		return nil, status.Errorf(codes.InvalidArgument, "verify JWT-SVID: no bundle for trust domain %s", td)
	}
	s, err := structpb.NewStruct(plainNumbers(claims).(map[string]any))
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, "claims cannot be represented")
	}
	return &workload.ValidateJWTSVIDResponse{SpiffeId: id.String(), Claims: s}, nil
}

// plainNumbers turns json.Number, which protobuf does not know, into float64.
func plainNumbers(v any) any {
	switch v := v.(type) {
	case json.Number:
		f, err := v.Float64()
		if err != nil {
			return v.String()
		}
		return f
	case map[string]any:
		for k := range v {
			v[k] = plainNumbers(v[k])
		}
	case []any:
		for i := range v {
			v[i] = plainNumbers(v[i])
		}
	}
	return v
}
