package proxy

import (
	"bytes"
	"context"
	"fmt"
	"slices"

	"sallyport/internal/audit"
	"sallyport/internal/http1"
	"sallyport/internal/mesh"
	"sallyport/internal/shadow"
	"sallyport/internal/upstream"
)

// A call of a shadow is marked: by a field, and by a member of tracestate, which
// applications hand on with traceparent. What an application does on behalf of
// such a call goes out with either, and then may change nothing. That only takes
// rights away, so that a mark is believed from anybody. But what is done for a
// shadow is copied for no other: for that only the field counts, which proxies
// alone can set, and what belongs to a trace with which it has come from a peer.

// marks sees whether the call is marked, and whether by the field.
func (x *call) marks() (field bool) {
	for i := range x.req.Fields {
		switch f := &x.req.Fields[i]; len(f.Name) {
		case len(shadow.Marker):
			field = field || is(f.Name, "sallyport-shadow") && string(f.Value) == "1"
		case len("tracestate"):
			x.marked = x.marked || is(f.Name, "tracestate") && hasMember(f.Value, stateMember)
		}
	}
	x.marked = x.marked || field
	return field
}

// mark tells the next that the call is marked, and by the field if that is true.
func (x *call) mark(field bool) {
	if field {
		x.extra = append(x.extra, shadow.Marker+": 1\r\n"...)
	}
	x.extra = append(x.extra, "Tracestate: "+stateMember...)
	if x.ex.ToUp.Drop == dropped { // the trace goes on, and its state with it
		x.extra = appendState(x.extra, x.req.Fields)
	}
	x.ex.ToUp.Drop = droppedWithState
	x.extra = append(x.extra, '\r', '\n')
}

// stateMember is ours in tracestate.
const stateMember = "sallyport=shadow"

// The bounds of W3C Trace Context section 3.3.1.1 and 3.3.1.5.
const (
	maxStateMembers = 32
	maxState        = 512 // bytes
)

// hasMember says whether a list has a member.
func hasMember(list []byte, member string) bool {
	for item := range bytes.SplitSeq(list, []byte{','}) {
		if string(bytes.TrimSpace(item)) == member {
			return true
		}
	}
	return false
}

// appendState appends the members of others, as long as there is room.
func appendState(b []byte, fields []http1.Field) []byte {
	n, size := 1, len(stateMember)
	for i := range fields {
		if !is(fields[i].Name, "tracestate") {
			continue
		}
		for item := range bytes.SplitSeq(fields[i].Value, []byte{','}) {
			item = bytes.TrimSpace(item)
			if len(item) == 0 || bytes.HasPrefix(item, []byte("sallyport=")) {
				continue
			}
			if n++; n > maxStateMembers || size+1+len(item) > maxState {
				return b
			}
			size += 1 + len(item)
			b = append(append(b, ','), item...)
		}
	}
	return b
}

// harmless holds what is done for a shadow to what changes nothing, but for the
// services that stand beside it. Of a workload that is all shadow everything is
// done for one.
func (d *door) harmless(x *call) *refusal {
	if !x.marked && !d.cfg.ShadowOnly || shadow.Safe(x.req.Method) && !x.req.Upgrade {
		return nil
	}
	leaves := !x.opaque && x.req.Form == http1.Authority || x.to.name == GatewayName
	if !leaves && slices.Contains(d.cfg.ShadowWrites, x.to.name) {
		return nil
	}
	r := audit.Record{Reason: "shadow_write", Dir: string(mesh.Out), Src: d.self, Dst: x.dst, Verb: x.req.Verb(), Path: "-", Peer: x.remote,
		Trace: x.traceText(), Detail: "it is done for a shadow, which may write only to the services in shadow.writes_to"}
	if !x.opaque {
		r.Path = x.req.PathText()
	}
	return d.deny(r)
}

// mirror has the shadows of the call's route get a copy.
func (d *door) mirror(x *call) *refusal {
	if d.cfg.Mirror == nil || x.req.Upgrade || x.req.Form == http1.Authority || x.to.route == nil {
		return nil
	}
	r := x.to.route
	var picked []*mesh.Shadow
	for i := range r.Shadows {
		if s := &r.Shadows[i]; shadow.Copyable(s.Shadow, x.req.Method) && s.Copies(&x.look) {
			picked = append(picked, s.Shadow)
		}
	}
	if x.proven {
		d.cfg.Mirror.Skip(picked)
		return nil
	}
	if len(picked) == 0 {
		return nil
	}
	x.copied = d.cfg.Mirror.Copy(picked, shadow.Call{
		Service: x.to.name, Route: r.Name, Src: d.self, Dst: x.dst, Method: x.req.Verb(), Path: x.req.PathText(), Trace: x.trace, Start: x.start,
	})
	if x.copied != nil {
		x.ex.Tee = x.copied
	}
	return nil
}

// mirrored hands the copy over once the call has ended.
func (d *door) mirrored(x *call) {
	if x.copied == nil {
		return
	}
	x.ex.Tee = nil
	x.copied.End(x.res.Whole, x.err == nil && x.refused == nil && x.res.ResponseStarted)
	x.copied = nil
}

// LendShadow lends connections to the backends of shadows.
func LendShadow(services *upstream.Services) func(ctx context.Context, to mesh.Backend, fresh bool) (shadow.Line, error) {
	return func(ctx context.Context, to mesh.Backend, fresh bool) (shadow.Line, error) {
		if to.Service == "" {
			return shadow.Line{}, fmt.Errorf("shadow at %s: only a service of the mesh can be one", to.Address)
		}
		up, err := services.Lend(ctx, &upstream.Want{Service: to.Service, Subset: to.Subset, Fresh: fresh})
		if err != nil {
			return shadow.Line{}, err
		}
		done := func(again bool) {
			if again {
				up.Put()
			} else {
				up.Discard()
			}
		}
		if err := up.Stands(); err != nil {
			done(false)
			return shadow.Line{}, err
		}
		return shadow.Line{Conn: up.Conn, Reused: up.Reused, Done: done}, nil
	}
}
