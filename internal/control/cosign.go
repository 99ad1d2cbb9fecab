package control

import (
	"context"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	"sallyport/internal/control/meshpb"
)

// A CosignRequest asks for the signature of the issuer under a checkpoint of an
// audit log.
type CosignRequest struct {
	// Key is the verifier key of the log, Checkpoint what it has signed.
	Key        string
	Checkpoint []byte
	// Proof shows that the log of OldSize records is its beginning.
	OldSize uint64
	Proof   [][]byte
}

// A CosignReply is the answer.
type CosignReply struct {
	// Signed is the checkpoint with the signature; empty when there is none.
	Signed []byte
	// Have is the size signed last. If it is not OldSize, ask again with it.
	Have uint64
	// Contradiction is empty, or how the log contradicts what was signed.
	Contradiction Contradiction
}

// A Contradiction is how an audit log is not the one that was cosigned.
type Contradiction string

// The closed set of contradictions. LogOther comes with a signature; LogForeign
// is a checkpoint signed under the name of another proxy.
const (
	LogCut     Contradiction = "cut"
	LogForked  Contradiction = "forked"
	LogOther   Contradiction = "other"
	LogForeign Contradiction = "foreign"
)

// Limits of a request.
const (
	maxCosignKey  = 4 << 10
	maxCheckpoint = 16 << 10
	maxProof      = 128
)

// Cosign asks the issuer to sign a checkpoint of the audit log of a workload's
// proxy.
func (c *Client) Cosign(ctx context.Context, workload spiffeid.ID, q CosignRequest) (CosignReply, error) {
	var out CosignReply
	err := c.call(ctx, "cosign audit log", func(l *link) error {
		r, err := meshpb.NewMeshClient(l.cc).Cosign(ctx, &meshpb.CosignRequest{
			Workload: workload.String(), Key: q.Key, Checkpoint: q.Checkpoint, OldSize: q.OldSize, Proof: q.Proof,
		})
		out = CosignReply{Signed: r.GetSigned(), Have: r.GetHave(), Contradiction: Contradiction(r.GetContradiction())}
		return err
	})
	return out, err
}

// AuditHeads is how far the audit logs of proxies were cosigned.
type AuditHeads struct {
	// Witnesses are the verifier keys of the issuers.
	Witnesses []string
	// Heads are the newest states, as the issuer keeps them.
	Heads [][]byte
}

// AuditHeads says how far audit logs were cosigned.
func (a *Admin) AuditHeads(ctx context.Context) (AuditHeads, error) {
	r, err := meshpb.NewAdminClient(a.cc).AuditHeads(ctx, &meshpb.AuditHeadsRequest{})
	if err != nil {
		return AuditHeads{}, a.explain("read audit heads", err)
	}
	return AuditHeads{Witnesses: r.GetWitnesses(), Heads: r.GetHeads()}, nil
}

// AuditHeads says how far audit logs were cosigned.
func (a *adminAPI) AuditHeads(ctx context.Context, _ *meshpb.AuditHeadsRequest) (*meshpb.AuditHeadsResponse, error) {
	if a.s.cfg.Witness == nil {
		return nil, errNoWitness()
	}
	h, err := a.s.cfg.Witness.Heads(ctx)
	if err != nil {
		return nil, fmt.Errorf("read audit heads: %w", err)
	}
	return &meshpb.AuditHeadsResponse{Witnesses: h.Witnesses, Heads: h.Heads}, nil
}

func errNoWitness() error {
	return refuse(codes.Unimplemented, "this issuer cosigns no audit logs")
}

// Cosign signs for a proxy of the calling agent.
func (a *meshAPI) Cosign(ctx context.Context, r *meshpb.CosignRequest) (*meshpb.CosignReply, error) {
	who, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	if a.s.cfg.Witness == nil {
		return nil, errNoWitness()
	}
	workload, err := workloadID(r.GetWorkload(), a.s.cfg.TrustDomain)
	if err != nil {
		return nil, refuse(codes.InvalidArgument, "workload: %v", err)
	}
	if !a.s.entitled(who.id, workload) {
		return nil, a.s.errNotEntitled(who.id, workload)
	}
	if len(r.GetKey()) > maxCosignKey || len(r.GetCheckpoint()) > maxCheckpoint || len(r.GetProof()) > maxProof {
		return nil, refuse(codes.InvalidArgument, "a checkpoint has at most %d bytes, a key %d, a proof %d hashes", maxCheckpoint, maxCosignKey, maxProof)
	}
	out, err := a.s.cfg.Witness.Cosign(ctx, who.id, workload, CosignRequest{
		Key: r.GetKey(), Checkpoint: r.GetCheckpoint(), OldSize: r.GetOldSize(), Proof: r.GetProof(),
	})
	if err != nil {
		return nil, fmt.Errorf("cosign audit log of %s: %w", workload, err)
	}
	return &meshpb.CosignReply{Signed: out.Signed, Have: out.Have, Contradiction: string(out.Contradiction)}, nil
}
