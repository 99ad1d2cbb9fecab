package control

import (
	"cmp"
	"context"
	"errors"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"sallyport/internal/mesh"
)

const (
	// maxItems bounds a batch of an operator's call, and a page of a list.
	maxItems = 1000
	// maxSelectors bounds the selectors of one entry or filter.
	maxSelectors = 64
)

// A Keeper changes what operators change by calls. Its methods are durable when
// they return, and wake who waits for Registry.Changed.
type Keeper interface {
	// EditEntries does what is possible of the edits; see mesh.EntryResult. Its
	// errors of one edit are mesh.ErrNotFound, ErrExists, ErrReviewed, Errors,
	// and those of EntryEdit.Change.
	EditEntries(ctx context.Context, edits []mesh.EntryEdit) ([]mesh.EntryResult, error)
	// DeleteAgent forgets an agent, which may attest again.
	DeleteAgent(ctx context.Context, id spiffeid.ID) error
	// Revoke is durable when it returns; mesh.ErrNotFound when the order names
	// nothing that holds.
	Revoke(ctx context.Context, o mesh.RevokeOrder) (mesh.RevokeResult, error)
}

func (s *Server) keeper() (Keeper, error) {
	if s.cfg.Keeper == nil {
		return nil, refuse(codes.FailedPrecondition, "this issuer keeps nothing that calls change: edit the reviewed files")
	}
	return s.cfg.Keeper, nil
}

// An entryFilter is the filter of CountEntries and of ListEntries.
type entryFilter interface {
	GetBySpiffeId() *types.SPIFFEID
	GetByParentId() *types.SPIFFEID
	GetBySelectors() *types.SelectorMatch
	GetByFederatesWith() *types.FederatesWithMatch
	GetByHint() *wrapperspb.StringValue
	GetByDownstream() *wrapperspb.BoolValue
}

// filtered returns the entries that the caller may see and the filter keeps,
// by ID.
func (a *entryAPI) filtered(ctx context.Context, f entryFilter) ([]mesh.Entry, error) {
	var keep []func(mesh.Entry) bool
	for _, by := range []struct {
		field string
		id    *types.SPIFFEID
		of    func(mesh.Entry) spiffeid.ID
	}{
		{"by_spiffe_id", f.GetBySpiffeId(), func(e mesh.Entry) spiffeid.ID { return e.SPIFFEID }},
		{"by_parent_id", f.GetByParentId(), func(e mesh.Entry) spiffeid.ID { return e.ParentID }},
	} {
		if by.id == nil {
			continue
		}
		want, err := idFromWire(by.id)
		if err != nil {
			return nil, refuse(codes.InvalidArgument, "filter.%s: %v", by.field, err)
		}
		keep = append(keep, func(e mesh.Entry) bool { return by.of(e) == want })
	}
	if m := f.GetBySelectors(); m != nil {
		match, err := selectorMatch("filter.by_selectors", m)
		if err != nil {
			return nil, err
		}
		keep = append(keep, func(e mesh.Entry) bool { return match(e.Selectors) })
	}
	if m := f.GetByFederatesWith(); m != nil {
		match, err := domainMatch("filter.by_federates_with", m)
		if err != nil {
			return nil, err
		}
		keep = append(keep, func(e mesh.Entry) bool { return match(e.FederatesWith) })
	}
	if h := f.GetByHint(); h != nil {
		keep = append(keep, func(e mesh.Entry) bool { return e.Hint == h.GetValue() })
	}
	if d := f.GetByDownstream(); d != nil {
		keep = append(keep, func(e mesh.Entry) bool { return e.Downstream == d.GetValue() })
	}
	out := slices.DeleteFunc(a.s.cfg.Registry.Entries(), func(e mesh.Entry) bool {
		return slices.ContainsFunc(keep, func(k func(mesh.Entry) bool) bool { return !k(e) })
	})
	out = visible(ctx, a.s, out, func(e mesh.Entry) spiffeid.ID { return e.SPIFFEID })
	slices.SortFunc(out, func(x, y mesh.Entry) int { return strings.Compare(x.ID, y.ID) })
	return out, nil
}

// selectorMatch reads a match, named by its field for errors.
func selectorMatch(field string, m *types.SelectorMatch) (func([]mesh.Selector) bool, error) {
	if n := len(m.GetSelectors()); n == 0 || n > maxSelectors {
		return nil, refuse(codes.InvalidArgument, "%s.selectors: there are %d, want 1 to %d", field, n, maxSelectors)
	}
	want := map[mesh.Selector]bool{}
	for _, s := range selectorsFromWire(m.GetSelectors()) {
		if s.Type == "" || strings.Contains(s.Type, ":") || s.Value == "" {
			return nil, refuse(codes.InvalidArgument, "%s.selectors: %.64q is not a type without colon and a value", field, s.String())
		}
		want[s] = true
	}
	// Of have, how many are wanted; no selector stands there twice.
	common := func(have []mesh.Selector) (n int) {
		for _, s := range have {
			if want[s] {
				n++
			}
		}
		return n
	}
	switch m.GetMatch() {
	case types.SelectorMatch_MATCH_EXACT:
		return func(have []mesh.Selector) bool { return len(have) == len(want) && common(have) == len(want) }, nil
	case types.SelectorMatch_MATCH_SUBSET:
		return func(have []mesh.Selector) bool { return len(have) > 0 && common(have) == len(have) }, nil
	case types.SelectorMatch_MATCH_SUPERSET:
		return func(have []mesh.Selector) bool { return common(have) == len(want) }, nil
	case types.SelectorMatch_MATCH_ANY:
		return func(have []mesh.Selector) bool { return common(have) > 0 }, nil
	}
	return nil, refuse(codes.InvalidArgument, "%s.match: %d is no match behaviour", field, m.GetMatch())
}

// pageOf returns one page of what is sorted by key, and the token of the next.
func pageOf[T any](all []T, key func(T) string, size int32, token string) ([]T, string, error) {
	if size < 0 {
		return nil, "", refuse(codes.InvalidArgument, "page_size: %d is negative", size)
	}
	if len(token) > maxID {
		return nil, "", refuse(codes.InvalidArgument, "page_token: it is not one of this issuer's")
	}
	if token != "" {
		at, found := slices.BinarySearchFunc(all, token, func(t T, k string) int { return cmp.Compare(key(t), k) })
		if found {
			at++
		}
		all = all[at:]
	}
	n := maxItems
	if size > 0 {
		n = min(n, int(size))
	}
	if len(all) <= n {
		return all, "", nil
	}
	return all[:n], key(all[n-1]), nil
}

// CountEntries counts what ListEntries would list.
func (a *entryAPI) CountEntries(ctx context.Context, req *entryv1.CountEntriesRequest) (*entryv1.CountEntriesResponse, error) {
	es, err := a.filtered(ctx, req.GetFilter())
	if err != nil {
		return nil, err
	}
	return &entryv1.CountEntriesResponse{Count: int32(min(len(es), math.MaxInt32))}, nil
}

// ListEntries lists entries of files and of calls alike, a page at a time.
func (a *entryAPI) ListEntries(ctx context.Context, req *entryv1.ListEntriesRequest) (*entryv1.ListEntriesResponse, error) {
	es, err := a.filtered(ctx, req.GetFilter())
	if err != nil {
		return nil, err
	}
	page, next, err := pageOf(es, func(e mesh.Entry) string { return e.ID }, req.GetPageSize(), req.GetPageToken())
	if err != nil {
		return nil, err
	}
	return &entryv1.ListEntriesResponse{Entries: a.masked(page, req.GetOutputMask()), NextPageToken: next}, nil
}

func (a *entryAPI) masked(es []mesh.Entry, m *types.EntryMask) []*types.Entry {
	out := a.s.wireEntries(es)
	for _, e := range out {
		applyEntryMask(e, m)
	}
	return out
}

// GetEntry returns one entry.
func (a *entryAPI) GetEntry(ctx context.Context, req *entryv1.GetEntryRequest) (*types.Entry, error) {
	if req.GetId() == "" {
		return nil, refuse(codes.InvalidArgument, "id: missing")
	}
	for _, e := range a.s.cfg.Registry.Entries() {
		if e.ID != req.GetId() {
			continue
		}
		if err := a.s.may(ctx, e.SPIFFEID); err != nil {
			return nil, err
		}
		return a.masked([]mesh.Entry{e}, req.GetOutputMask())[0], nil
	}
	return nil, refuse(codes.NotFound, "entry not found")
}

// BatchCreateEntry makes entries beside those of the files. One that fails does
// not fail the others.
func (a *entryAPI) BatchCreateEntry(ctx context.Context, req *entryv1.BatchCreateEntryRequest) (*entryv1.BatchCreateEntryResponse, error) {
	edits := make([]mesh.EntryEdit, len(req.GetEntries()))
	for i, w := range req.GetEntries() {
		edits[i] = mesh.EntryEdit{Change: func(mesh.Entry) (mesh.Entry, error) {
			e := mesh.Entry{ID: w.GetId()}
			if err := change(&e, w, nil); err != nil {
				return e, err
			}
			return e, a.s.may(ctx, e.SPIFFEID)
		}}
	}
	results, err := a.edit(ctx, "entries", edits)
	if err != nil {
		return nil, err
	}
	resp := &entryv1.BatchCreateEntryResponse{}
	for _, r := range results {
		st := a.status(ctx, r.Err)
		out := &entryv1.BatchCreateEntryResponse_Result{Status: st}
		if c := codes.Code(st.Code); c == codes.OK || c == codes.AlreadyExists {
			out.Entry = a.masked([]mesh.Entry{r.Entry}, req.GetOutputMask())[0]
		}
		resp.Results = append(resp.Results, out)
	}
	return resp, nil
}

// BatchUpdateEntry changes the fields that the input mask names, all without
// a mask.
func (a *entryAPI) BatchUpdateEntry(ctx context.Context, req *entryv1.BatchUpdateEntryRequest) (*entryv1.BatchUpdateEntryResponse, error) {
	edits := make([]mesh.EntryEdit, len(req.GetEntries()))
	for i, w := range req.GetEntries() {
		if w.GetId() == "" {
			edits[i] = noEdit(refuse(codes.InvalidArgument, "entry.id: missing"))
			continue
		}
		edits[i] = mesh.EntryEdit{ID: w.GetId(), Change: func(e mesh.Entry) (mesh.Entry, error) {
			if err := a.s.may(ctx, e.SPIFFEID); err != nil {
				return e, err
			}
			old := e.SPIFFEID
			if err := change(&e, w, req.GetInputMask()); err != nil || e.SPIFFEID == old {
				return e, err
			}
			return e, a.s.may(ctx, e.SPIFFEID)
		}}
	}
	results, err := a.edit(ctx, "entries", edits)
	if err != nil {
		return nil, err
	}
	resp := &entryv1.BatchUpdateEntryResponse{}
	for _, r := range results {
		out := &entryv1.BatchUpdateEntryResponse_Result{Status: a.status(ctx, r.Err)}
		if r.Err == nil {
			out.Entry = a.masked([]mesh.Entry{r.Entry}, req.GetOutputMask())[0]
		}
		resp.Results = append(resp.Results, out)
	}
	return resp, nil
}

// BatchDeleteEntry removes entries. SVIDs issued for them are revoked.
func (a *entryAPI) BatchDeleteEntry(ctx context.Context, req *entryv1.BatchDeleteEntryRequest) (*entryv1.BatchDeleteEntryResponse, error) {
	if _, err := a.s.keeper(); err != nil {
		return nil, err
	}
	known := map[string]spiffeid.ID{}
	for _, e := range a.s.cfg.Registry.Entries() {
		known[e.ID] = e.SPIFFEID
	}
	edits := make([]mesh.EntryEdit, len(req.GetIds()))
	refused := make([]error, len(edits))
	for i, id := range req.GetIds() {
		edits[i] = mesh.EntryEdit{ID: id, Delete: true}
		on, ok := known[id]
		switch {
		case id == "":
			refused[i] = refuse(codes.InvalidArgument, "ids[%d]: missing", i)
		case ok:
			refused[i] = a.s.may(ctx, on)
		}
		if refused[i] != nil || !ok {
			// Refused here, or absent: nothing is asked for.
			edits[i] = noEdit(cmp.Or(refused[i], refuse(codes.NotFound, "entry not found")))
		}
	}
	results, err := a.edit(ctx, "ids", edits)
	if err != nil {
		return nil, err
	}
	resp := &entryv1.BatchDeleteEntryResponse{}
	for i, r := range results {
		resp.Results = append(resp.Results, &entryv1.BatchDeleteEntryResponse_Result{Status: a.status(ctx, r.Err), Id: req.GetIds()[i]})
	}
	return resp, nil
}

// noEdit changes nothing, for a reason.
func noEdit(why error) mesh.EntryEdit {
	return mesh.EntryEdit{Change: func(mesh.Entry) (mesh.Entry, error) { return mesh.Entry{}, why }}
}

func (a *entryAPI) edit(ctx context.Context, field string, edits []mesh.EntryEdit) ([]mesh.EntryResult, error) {
	k, err := a.s.keeper()
	if err != nil {
		return nil, err
	}
	if len(edits) > maxItems {
		return nil, refuse(codes.InvalidArgument, "%s: there are %d, at most %d are changed at once", field, len(edits), maxItems)
	}
	if len(edits) == 0 {
		return nil, nil
	}
	return k.EditEntries(ctx, edits)
}

// status says what became of one edit.
func (a *entryAPI) status(ctx context.Context, err error) *types.Status {
	var wrong mesh.Errors
	switch {
	case errors.Is(err, mesh.ErrReviewed):
		err = refuse(codes.FailedPrecondition, "%v", err)
	case errors.Is(err, mesh.ErrExists):
		err = refuse(codes.AlreadyExists, "%v", err)
	case errors.Is(err, mesh.ErrNotFound):
		err = refuse(codes.NotFound, "entry not found")
	case errors.As(err, &wrong):
		var text []string
		for _, p := range wrong {
			text = append(text, p.Msg)
		}
		err = refuse(codes.InvalidArgument, "entry: %s", plain(strings.Join(text, "; ")))
	}
	code, message := a.s.itemStatus(ctx, err)
	return &types.Status{Code: int32(code), Message: message}
}

// change puts the fields of w into e that the mask names; all without one.
func change(e *mesh.Entry, w *types.Entry, m *types.EntryMask) error {
	if w == nil {
		return refuse(codes.InvalidArgument, "entry: missing")
	}
	all := m == nil
	federates, err := domainsFromWire(w.GetFederatesWith())
	if err != nil {
		return refuse(codes.InvalidArgument, "entry.federates_with: want names of trust domains")
	}
	put(all || m.GetFederatesWith(), &e.FederatesWith, federates)
	if w.GetStoreSvid() && (all || m.StoreSvid) {
		return refuse(codes.InvalidArgument, "entry.store_svid: SVIDs are not put into stores here, leave it out")
	}
	if all || m.SpiffeId {
		if e.SPIFFEID, err = idFromWire(w.GetSpiffeId()); err != nil {
			return refuse(codes.InvalidArgument, "entry.spiffe_id: %v", err)
		}
	}
	if all || m.ParentId {
		if e.ParentID, err = idFromWire(w.GetParentId()); err != nil {
			return refuse(codes.InvalidArgument, "entry.parent_id: %v", err)
		}
	}
	if all || m.Selectors {
		if n := len(w.GetSelectors()); n > maxSelectors {
			return refuse(codes.InvalidArgument, "entry.selectors: there are %d, at most %d are allowed", n, maxSelectors)
		}
		e.Selectors = selectorsFromWire(w.GetSelectors())
	}
	if all || m.DnsNames {
		if n := len(w.GetDnsNames()); n > maxSelectors {
			return refuse(codes.InvalidArgument, "entry.dns_names: there are %d, at most %d are allowed", n, maxSelectors)
		}
		e.DNSNames = w.GetDnsNames()
	}
	if all || m.ExpiresAt {
		if w.GetExpiresAt() < 0 || w.GetExpiresAt() > maxUnix {
			return refuse(codes.InvalidArgument, "entry.expires_at: %d is no time in seconds", w.GetExpiresAt())
		}
		e.ExpiresAt = time.Time{}
		if w.GetExpiresAt() > 0 {
			e.ExpiresAt = time.Unix(w.GetExpiresAt(), 0).UTC()
		}
	}
	put(all || m.GetX509SvidTtl(), &e.X509TTL, time.Duration(w.GetX509SvidTtl())*time.Second)
	put(all || m.GetJwtSvidTtl(), &e.JWTTTL, time.Duration(w.GetJwtSvidTtl())*time.Second)
	put(all || m.GetAdmin(), &e.Admin, w.GetAdmin())
	put(all || m.GetDownstream(), &e.Downstream, w.GetDownstream())
	put(all || m.GetHint(), &e.Hint, w.GetHint())
	return nil
}

// maxUnix is the last second of the year 9999, which time.Time can still print.
const maxUnix = 253402300799

func put[T any](yes bool, field *T, v T) {
	if yes {
		*field = v
	}
}
