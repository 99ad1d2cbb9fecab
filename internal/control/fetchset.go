package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

const (
	// maxSet bounds a signed set, bytes, as those who parse it do.
	maxSet = 8 << 20
	// setPart bounds the bytes of one message of it: thousands of proxies ask at
	// once, and a message and the 64 KiB that gRPC takes ahead of a slow one are
	// copied for each.
	setPart = 32 << 10
	// fetchTimeout bounds the wait for a whole set: a proxy acts on nothing
	// else meanwhile.
	fetchTimeout = time.Minute
	// setWork is how many bytes of a set cost an agent as much as one call.
	setWork = 16 << 10
)

// ErrUnfetched says that a signed set could not be looked at. It ends the stream
// and is no nack: nobody knows what is in it. Trying again may help.
var ErrUnfetched = errors.New("policy set not fetched")

// FetchSet sends a signed set to a proxy. It says more than the proxy's own
// snapshot does: all rows, the entries, and hashes of API keys. So only an
// attested node with an entry gets it, and only where keys are pinned.
func (a *meshAPI) FetchSet(req *meshpb.FetchSetRequest, st grpc.ServerStreamingServer[meshpb.SetPart]) error {
	who, err := callerOf(st.Context())
	if err != nil {
		return err
	}
	if err := checkKind(req.GetKind()); err != nil {
		return err
	}
	workload, err := workloadID(req.GetWorkload(), a.s.cfg.TrustDomain)
	if err != nil {
		return refuse(codes.InvalidArgument, "workload: %v", err)
	}
	if err := a.s.speaksFor(who.id, workload, req.GetKind()); err != nil {
		return err
	}
	if a.s.cfg.SetFile == nil {
		return refuse(codes.FailedPrecondition, "this issuer pins no keys, so it gives out no signed set: write policy.signers into its configuration")
	}
	file, err := a.s.cfg.SetFile(req.GetHash())
	if errors.Is(err, mesh.ErrNotFound) {
		return refuse(codes.NotFound, "%s", plain(err.Error()))
	}
	if err != nil {
		return err
	}
	if err := a.s.spend(who.id, float64(len(file))/setWork); err != nil {
		return err
	}
	for len(file) > 0 {
		// The node may be banned meanwhile.
		if err := st.Context().Err(); err != nil {
			return err
		}
		n := min(len(file), setPart)
		if err := st.Send(&meshpb.SetPart{Data: file[:n]}); err != nil {
			return err
		}
		file = file[n:]
	}
	return nil
}

// fetchSet gets a signed set from the issuer at the other end of a link. An
// error wraps ErrUnfetched unless there is more than a set may have.
func (c *Client) fetchSet(ctx context.Context, l *link, h *Hello, hash string) ([]byte, error) {
	const verb = "fetch policy set"
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	st, err := meshpb.NewMeshClient(l.cc).FetchSet(ctx, &meshpb.FetchSetRequest{Kind: h.Kind, Workload: h.Workload.String(), Hash: hash})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnfetched, c.explain(ctx, verb, l, err))
	}
	var out []byte
	for {
		m, err := st.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return out, nil
		case err != nil:
			return nil, fmt.Errorf("%w: %w", ErrUnfetched, c.explain(ctx, verb, l, err))
		case len(out)+len(m.GetData()) > maxSet:
			return nil, fmt.Errorf("the issuer sends more than %d bytes as a policy set", maxSet)
		}
		out = append(out, m.GetData()...)
	}
}

// vouch has the signed set of a snapshot looked at, where that is asked for.
func (s *subscriberState) vouch(ctx context.Context, set string) error {
	if s.hello.Vouch == nil {
		return nil
	}
	return s.hello.Vouch(ctx, set, func() ([]byte, error) { return s.fetch(ctx, set) })
}
