package control

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"sallyport/internal/control/meshpb"
)

// uploadBytes bounds the lines of one message, bytes.
const uploadBytes = 1 << 20

// An AuditSource gives the lines of a proxy's audit log in order.
type AuditSource interface {
	// Next blocks until there are lines after the sequence number given, and
	// returns some of them, without line feeds, with the number of the last.
	Next(ctx context.Context, after uint64) (lines [][]byte, last uint64, err error)
	// Acked is told that the lines up to seq are durable at the issuer.
	Acked(seq uint64) error
}

// UploadAudit sends a workload's audit lines after the sequence number given
// until ctx ends, over every loss of the connection. Lines may arrive twice,
// never out of order. It returns nil at the end of ctx; other errors are the
// source's, or wrap ErrMustReattest or ErrBanned.
func (c *Client) UploadAudit(ctx context.Context, workload spiffeid.ID, after uint64, src AuditSource) error {
	u := &upload{workload: workload.String(), after: after, src: src}
	return c.persist(ctx, "upload audit", nil, func(ctx context.Context, up func()) error {
		err := c.uploadOnce(ctx, u, up)
		if u.broken != nil {
			return fmt.Errorf("upload audit: %w: %w", errSource, u.broken)
		}
		return err
	})
}

// errSource ends an upload whose source fails.
var errSource = errors.New("audit source failed")

type upload struct {
	workload string
	after    uint64
	src      AuditSource
	// broken is the error of the source.
	broken error
}

func (c *Client) uploadOnce(ctx context.Context, u *upload, up func()) error {
	const verb = "upload audit"
	l, err := c.acquire()
	if err != nil {
		return fmt.Errorf("%s: %w", verb, err)
	}
	defer c.release(l)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	st, err := meshpb.NewMeshClient(l.cc).UploadAudit(ctx)
	if err == nil {
		err = accepted(st, cancel)
	}
	if err != nil {
		return c.explain(ctx, verb, l, err)
	}
	up()
	for {
		lines, last, err := u.next(ctx, l)
		if err != nil {
			u.broken = err
			return err
		}
		if len(lines) == 0 {
			return nil // a newer link has taken this one's place
		}
		if err := u.send(st, lines, last); err != nil {
			if errors.Is(err, io.EOF) {
				err = st.RecvMsg(&meshpb.AuditAck{})
			}
			return c.explain(ctx, verb, l, err)
		}
		u.after = last
		if err := u.src.Acked(last); err != nil {
			u.broken = err
			return err
		}
	}
}

// next waits for lines, or for the link to be replaced: no lines then.
func (u *upload) next(ctx context.Context, l *link) ([][]byte, uint64, error) {
	wait, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		defer cancel()
		select {
		case <-l.stale:
		case <-wait.Done():
		}
	}()
	lines, last, err := u.src.Next(wait, u.after)
	if err != nil && wait.Err() != nil {
		return nil, 0, nil
	}
	if err == nil && len(lines) == 0 {
		err = errors.New("source returned no lines")
	}
	return lines, last, err
}

// send sends lines in messages of bounded size and waits for each to be durable.
func (u *upload) send(st grpc.BidiStreamingClient[meshpb.AuditBatch, meshpb.AuditAck], lines [][]byte, last uint64) error {
	for len(lines) > 0 {
		n, size := 0, 0
		for n < len(lines) && n < maxAuditLines && (n == 0 || size+len(lines[n]) <= uploadBytes) {
			size += len(lines[n])
			n++
		}
		b := &meshpb.AuditBatch{Workload: u.workload, Lines: lines[:n], LastSeq: u.after}
		if lines = lines[n:]; len(lines) == 0 {
			b.LastSeq = last
		}
		if err := st.Send(b); err != nil {
			return err
		}
		ack, err := st.Recv()
		if err != nil {
			return err
		}
		if ack.GetLastSeq() != b.LastSeq {
			return fmt.Errorf("issuer acknowledged line %d, want %d", ack.GetLastSeq(), b.LastSeq)
		}
	}
	return nil
}
