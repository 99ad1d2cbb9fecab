package control

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"io"
	"sync"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"sallyport/internal/mesh"
)

// entryAPI is spire.api.server.entry.v1.
type entryAPI struct {
	entryv1.UnimplementedEntryServer
	s *Server
}

// entryRevisions numbers the states of each entry. An agent fetches and renews
// what has a higher number than it knows, so a number rises when, and only
// when, the entry's content changes.
type entryRevisions struct {
	mu   sync.Mutex
	seen map[string]entryState
}

type entryState struct {
	content  [32]byte
	revision int64
}

// of returns the revision of e. A state first seen takes the policy revision,
// or that of an entry made by a call: both survive a restart and never fall.
func (r *entryRevisions) of(e mesh.Entry, policyRevision uint64) int64 {
	content := fingerprint(e)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.seen == nil {
		r.seen = map[string]entryState{}
	}
	old, ok := r.seen[e.ID]
	if ok && old.content == content {
		return old.revision
	}
	rev := max(int64(policyRevision), e.Revision, 1)
	if ok {
		rev = max(rev, old.revision+1)
	}
	r.seen[e.ID] = entryState{content: content, revision: rev}
	return rev
}

// fingerprint is the hash of what entries say, wherever they are written.
func fingerprint(entries ...mesh.Entry) [32]byte {
	var b []byte
	for _, e := range entries {
		e.Origin = mesh.Origin{}
		// Every field of an Entry has a JSON form.
		line, _ := json.Marshal(e)
		b = append(append(b, line...), '\n')
	}
	return sha256.Sum256(b)
}

// authorizedEntries are those of the calling agent. As in SPIRE, an alias itself
// is not among them: nobody is given its identity.
func (s *Server) authorizedEntries(ctx context.Context) ([]*types.Entry, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	return s.wireEntries(s.cfg.Registry.EntriesFor(c.id)), nil
}

func (s *Server) wireEntries(entries []mesh.Entry) []*types.Entry {
	var policy uint64
	if snap := s.cfg.Registry.Current(); snap != nil {
		policy = snap.PolicyRevision
	}
	out := make([]*types.Entry, len(entries))
	for i, e := range entries {
		out[i] = entryToWire(e, s.revisions.of(e, policy))
	}
	return out
}

// GetAuthorizedEntries returns the agent's entries whole.
func (a *entryAPI) GetAuthorizedEntries(ctx context.Context, req *entryv1.GetAuthorizedEntriesRequest) (*entryv1.GetAuthorizedEntriesResponse, error) {
	entries, err := a.s.authorizedEntries(ctx)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		applyEntryMask(e, req.GetOutputMask())
	}
	return &entryv1.GetAuthorizedEntriesResponse{Entries: entries}, nil
}

// SyncAuthorizedEntries returns the agent's entries whole when they fit a page.
// Otherwise it pages their revisions and then what the agent asks for by ID.
func (a *entryAPI) SyncAuthorizedEntries(st grpc.BidiStreamingServer[entryv1.SyncAuthorizedEntriesRequest, entryv1.SyncAuthorizedEntriesResponse]) error {
	req, err := firstMessage(st, a.s.hello)
	if err != nil {
		return err
	}
	if len(req.GetIds()) > 0 {
		return refuse(codes.InvalidArgument, "the first request names no entries")
	}
	mask := req.GetOutputMask()
	if mask != nil && !mask.RevisionNumber {
		return refuse(codes.InvalidArgument, "revision_number cannot be masked")
	}
	entries, err := a.s.authorizedEntries(st.Context())
	if err != nil {
		return err
	}
	for _, e := range entries {
		applyEntryMask(e, mask)
	}
	if len(entries) <= entryPage {
		return st.Send(&entryv1.SyncAuthorizedEntriesResponse{Entries: entries})
	}
	byID := make(map[string]*types.Entry, len(entries))
	revisions := make([]*entryv1.EntryRevision, len(entries))
	for i, e := range entries {
		byID[e.Id] = e
		revisions[i] = &entryv1.EntryRevision{Id: e.Id, RevisionNumber: e.RevisionNumber, CreatedAt: e.CreatedAt}
	}
	for page, more := range pages(revisions) {
		if err := st.Send(&entryv1.SyncAuthorizedEntriesResponse{EntryRevisions: page, More: more}); err != nil {
			return err
		}
	}
	return answerIDs(st, byID)
}

// answerIDs sends the entries that each further request names. An ID that is
// not the agent's is passed over, as if it did not exist.
func answerIDs(st grpc.BidiStreamingServer[entryv1.SyncAuthorizedEntriesRequest, entryv1.SyncAuthorizedEntriesResponse], byID map[string]*types.Entry) error {
	for {
		req, err := st.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if len(req.GetIds()) > len(byID) {
			return refuse(codes.InvalidArgument, "%d entries asked for, there are %d", len(req.GetIds()), len(byID))
		}
		var found []*types.Entry
		for _, id := range req.GetIds() {
			if e := byID[id]; e != nil {
				found = append(found, e)
			}
		}
		for page, more := range pages(found) {
			if err := st.Send(&entryv1.SyncAuthorizedEntriesResponse{Entries: page, More: more}); err != nil {
				return err
			}
		}
	}
}

// pages yields all in pages, at least one, and whether another follows.
func pages[T any](all []T) func(func([]T, bool) bool) {
	return func(yield func([]T, bool) bool) {
		for len(all) > entryPage {
			if !yield(all[:entryPage], true) {
				return
			}
			all = all[entryPage:]
		}
		yield(all, false)
	}
}

// applyEntryMask clears what m leaves out. No mask means everything.
func applyEntryMask(e *types.Entry, m *types.EntryMask) {
	if m == nil {
		return
	}
	drop(!m.SpiffeId, &e.SpiffeId)
	drop(!m.ParentId, &e.ParentId)
	drop(!m.Selectors, &e.Selectors)
	drop(!m.X509SvidTtl, &e.X509SvidTtl)
	drop(!m.JwtSvidTtl, &e.JwtSvidTtl)
	drop(!m.DnsNames, &e.DnsNames)
	drop(!m.Hint, &e.Hint)
	drop(!m.RevisionNumber, &e.RevisionNumber)
	drop(!m.Admin, &e.Admin)
	drop(!m.Downstream, &e.Downstream)
	drop(!m.ExpiresAt, &e.ExpiresAt)
	drop(!m.CreatedAt, &e.CreatedAt)
}

func drop[T any](yes bool, field *T) {
	if yes {
		var zero T
		*field = zero
	}
}
