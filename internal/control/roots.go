package control

import (
	"context"
	"crypto/x509"
	"slices"
	"time"

	"google.golang.org/grpc/codes"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

// A Move is what an operator does to the replacement of the root.
type Move string

// MoveRotate takes the next step, MoveRollback undoes what was done, and
// MoveEmergency lets a new root sign at once.
const (
	MoveRotate    Move = "rotate"
	MoveRollback  Move = "rollback"
	MoveEmergency Move = "emergency"
)

// A RootKeeper replaces the root of the trust domain. It is safe for
// concurrent use.
type RootKeeper interface {
	// TaintedX509 are those of Authority.X509Bundle under which SVIDs are to be
	// fetched anew.
	TaintedX509() []*x509.Certificate
	// Roots says how the replacement stands.
	Roots() RootStatus
	// MoveRoots takes a step. Its error is a sentence for the operator, and
	// nothing has changed then.
	MoveRoots(ctx context.Context, m Move, force, through bool) (RootStatus, error)
	// MoveAuthority takes one step, "prepare", "activate", "taint" or "revoke",
	// for the authority of a kind with an ID; to prepare names none. Its error
	// is of Unfit or Unready when the caller is to be told.
	MoveAuthority(ctx context.Context, kind, step, id string) (RootStatus, error)
}

// RootStatus is how the replacement of the root stands.
type RootStatus struct {
	// Phase is steady, prepared, activated, tainted or withdrawn; Pace is time,
	// hand or once.
	Phase       string            `json:"phase"`
	Pace        string            `json:"pace"`
	Since       time.Time         `json:"since,omitzero"`
	Emergency   bool              `json:"emergency,omitempty"`
	Authorities []AuthorityStatus `json:"authorities"`
	// Next is the step to come; Confirmed of Live proxies have what it needs.
	Next      string `json:"next"`
	Confirmed int    `json:"confirmed"`
	Live      int    `json:"live"`
	// IssuersConfirmed of IssuersLive that share the root are ready for it; both
	// are 0 of an issuer alone.
	IssuersConfirmed int      `json:"issuers_confirmed,omitempty"`
	IssuersLive      int      `json:"issuers_live,omitempty"`
	Stragglers       []string `json:"stragglers,omitempty"`
	// Known is false while the issuer cannot say which proxies live.
	Known     bool      `json:"known"`
	NotBefore time.Time `json:"not_before,omitzero"`
	// Due is when time takes the step; zero when it does not.
	Due time.Time `json:"due,omitzero"`
}

// AuthorityStatus is one root, intermediate or JWT key.
type AuthorityStatus struct {
	ID string `json:"id"`
	// Kind is x509 of a root, intermediate of one that an upstream authority
	// signed, or jwt.
	Kind    string    `json:"kind"`
	Expires time.Time `json:"expires"`
	Signs   bool      `json:"signs,omitempty"`
	// Next is to sign after the one that does.
	Next    bool `json:"next,omitempty"`
	Tainted bool `json:"tainted,omitempty"`
	// SubjectKeyID is that of the root, or of the root above an intermediate.
	SubjectKeyID string `json:"-"`
}

// upstream says that the roots are those of an upstream authority.
func (st RootStatus) upstream() bool {
	return slices.ContainsFunc(st.Authorities, func(a AuthorityStatus) bool { return a.Kind == KindIntermediate })
}

const (
	// maxAuthorities and maxAuthority bound what a proxy may say of its trust.
	maxAuthorities = 64
	maxAuthority   = 128 // bytes
)

func authoritiesToWire(a *mesh.Authorities) *meshpb.Authorities {
	if a == nil {
		return nil
	}
	return &meshpb.Authorities{Trusts: a.Trusts, Shows: a.Shows}
}

// authoritiesFromWire reads what is out of bounds as not said: such a proxy
// confirms nothing.
func authoritiesFromWire(w *meshpb.Authorities) *mesh.Authorities {
	if w == nil {
		return nil
	}
	for _, ids := range [][]string{w.GetTrusts(), w.GetShows()} {
		if len(ids) > maxAuthorities {
			return nil
		}
		for _, id := range ids {
			if id == "" || len(id) > maxAuthority {
				return nil
			}
		}
	}
	return &mesh.Authorities{Trusts: w.GetTrusts(), Shows: w.GetShows()}
}

// Roots says how the replacement of the root stands.
func (a *adminAPI) Roots(context.Context, *meshpb.RootsRequest) (*meshpb.RootsResponse, error) {
	k := a.s.cfg.Roots
	if k == nil {
		return nil, errNoRoots()
	}
	return rootsToWire(k.Roots()), nil
}

// MoveRoots takes a step of it.
func (a *adminAPI) MoveRoots(ctx context.Context, req *meshpb.MoveRootsRequest) (*meshpb.RootsResponse, error) {
	k := a.s.cfg.Roots
	if k == nil {
		return nil, errNoRoots()
	}
	m := Move(req.GetMove())
	if m != MoveRotate && m != MoveRollback && m != MoveEmergency {
		return nil, refuse(codes.InvalidArgument, "move %.64q is not rotate, rollback or emergency", req.GetMove())
	}
	st, err := k.MoveRoots(ctx, m, req.GetForce(), req.GetThrough())
	if err != nil {
		// The socket is the operator's own, so the cause may cross it.
		return nil, refuse(codes.FailedPrecondition, "%v", err)
	}
	return rootsToWire(st), nil
}

func errNoRoots() error {
	return refuse(codes.Unimplemented, "this issuer does not replace its root")
}

func rootsToWire(st RootStatus) *meshpb.RootsResponse {
	w := &meshpb.RootsResponse{
		Phase: st.Phase, Pace: st.Pace, Since: timeToWire(st.Since), Emergency: st.Emergency,
		Next: st.Next, Confirmed: uint32(st.Confirmed), Live: uint32(st.Live), Stragglers: st.Stragglers,
		Known: st.Known, NotBefore: timeToWire(st.NotBefore), Due: timeToWire(st.Due),
		IssuersConfirmed: uint32(st.IssuersConfirmed), IssuersLive: uint32(st.IssuersLive),
	}
	for _, a := range st.Authorities {
		w.Authorities = append(w.Authorities, &meshpb.Authority{Id: a.ID, Kind: a.Kind, Expires: timeToWire(a.Expires), Signs: a.Signs, Next: a.Next, Tainted: a.Tainted})
	}
	return w
}

func rootsFromWire(w *meshpb.RootsResponse) RootStatus {
	st := RootStatus{
		Phase: w.GetPhase(), Pace: w.GetPace(), Since: timeFromWire(w.GetSince()), Emergency: w.GetEmergency(),
		Next: w.GetNext(), Confirmed: int(w.GetConfirmed()), Live: int(w.GetLive()), Stragglers: w.GetStragglers(),
		Known: w.GetKnown(), NotBefore: timeFromWire(w.GetNotBefore()), Due: timeFromWire(w.GetDue()),
		IssuersConfirmed: int(w.GetIssuersConfirmed()), IssuersLive: int(w.GetIssuersLive()),
	}
	for _, a := range w.GetAuthorities() {
		st.Authorities = append(st.Authorities, AuthorityStatus{ID: a.GetId(), Kind: a.GetKind(), Expires: timeFromWire(a.GetExpires()), Signs: a.GetSigns(), Next: a.GetNext(), Tainted: a.GetTainted()})
	}
	return st
}

// Roots says how the replacement of the root stands.
func (a *Admin) Roots(ctx context.Context) (RootStatus, error) {
	resp, err := meshpb.NewAdminClient(a.cc).Roots(ctx, &meshpb.RootsRequest{})
	if err != nil {
		return RootStatus{}, a.explain("read roots", err)
	}
	return rootsFromWire(resp), nil
}

// MoveRoots takes a step of it; ErrRefused while it may not be taken.
func (a *Admin) MoveRoots(ctx context.Context, m Move, force, through bool) (RootStatus, error) {
	resp, err := meshpb.NewAdminClient(a.cc).MoveRoots(ctx, &meshpb.MoveRootsRequest{Move: string(m), Force: force, Through: through})
	if err != nil {
		return RootStatus{}, a.explain(string(m)+" root", err)
	}
	return rootsFromWire(resp), nil
}
