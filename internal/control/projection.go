package control

import (
	"fmt"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

// projections holds what each kind of reader may see of the newest snapshot,
// encoded once, however many proxies read it.
type projections struct {
	mu   sync.Mutex
	snap *mesh.Snapshot
	made map[projectionKey]*projection
}

// A projectionKey names a reader: a workload's sidecars, or every gateway.
type projectionKey struct {
	kind     string
	workload spiffeid.ID
}

type projection struct {
	once sync.Once
	msg  *meshpb.Snapshot
	// whole is msg as it is sent, same what is sent to who has its content.
	whole, same *encoded
	// limits are those that its readers share with others.
	limits map[mesh.Quota]uint32
	// candidate is the content hash of the candidate in msg; tooLong is how
	// many bytes it has when it is not there for that.
	candidate string
	tooLong   int
	err       error
}

// of returns the projection of snap for a reader. It must not be changed.
func (p *projections) of(snap *mesh.Snapshot, kind string, workload spiffeid.ID) (*projection, error) {
	key := projectionKey{kind: kind, workload: workload}
	if kind == KindGateway {
		key.workload = spiffeid.ID{}
	}
	pr := p.slot(snap, key)
	pr.once.Do(func() {
		if pr.err = pr.project(snap, key); pr.err == nil {
			pr.err = pr.encode(snap)
		}
	})
	return pr, pr.err
}

// slot finds the place of a projection. Only the newest snapshot has places; a
// reader that is late with an older one works for itself.
func (p *projections) slot(snap *mesh.Snapshot, key projectionKey) *projection {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.snap != snap {
		if p.snap != nil && snap.Revision < p.snap.Revision {
			return &projection{}
		}
		p.snap, p.made = snap, map[projectionKey]*projection{}
	}
	pr := p.made[key]
	if pr == nil {
		pr = &projection{}
		p.made[key] = pr
	}
	return pr
}

func (pr *projection) project(snap *mesh.Snapshot, key projectionKey) error {
	var own *mesh.Snapshot
	if key.kind == KindGateway {
		own = snap.ProjectGateway()
	} else {
		own = snap.Project(key.workload)
	}
	m := &meshpb.Snapshot{
		Revision:       own.Revision,
		PolicyRevision: own.PolicyRevision,
		Hash:           own.ContentHash(),
		Body:           own.Encode(),
		PolicySet:      own.PolicySet,
	}
	const room = maxMessage - 4096
	if len(m.Body) > room {
		return fmt.Errorf("snapshot of revision %d for %s has %d bytes, a message holds %d", own.Revision, key.workload, len(m.Body), maxMessage)
	}
	pr.msg, pr.limits = m, own.SharedLimits()
	if own.Candidate == nil {
		return nil
	}
	// What is in force is sent, whatever becomes of what is tried.
	if b := own.Candidate.Encode(); len(m.Body)+len(b) > room {
		pr.tooLong = len(b)
	} else {
		m.Candidate, pr.candidate = b, own.Candidate.ContentHash()
	}
	return nil
}

// encode writes down what is sent to each of its readers.
func (pr *projection) encode(snap *mesh.Snapshot) (err error) {
	if pr.whole, err = encode(&meshpb.SubscribeResponse{Message: &meshpb.SubscribeResponse_Snapshot{Snapshot: pr.msg}}); err != nil {
		return err
	}
	pr.same, err = encode(&meshpb.SubscribeResponse{Message: &meshpb.SubscribeResponse_Same{Same: &meshpb.Same{
		Revision: pr.msg.Revision, PolicyRevision: pr.msg.PolicyRevision, PolicyHash: snap.PolicyHash, PolicySet: snap.PolicySet,
	}}})
	return err
}
