package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"sallyport/internal/audit"
)

// A stage shows the running demo to somebody at the keys.
type stage struct {
	d *demo
	p *decisionPrinter
	// keys are those pressed; closed when there will be no more, nil when there are
	// none.
	keys chan byte
}

// readKeys sends what is typed, byte by byte. Nobody waits for its end: a read of
// a terminal cannot be called off.
func readKeys(in io.Reader) chan byte {
	keys := make(chan byte, 16)
	go func() {
		defer close(keys)
		b := make([]byte, 1)
		for {
			if _, err := io.ReadFull(in, b); err != nil {
				return
			}
			select {
			case keys <- b[0]:
			default: // typed while something is done: not meant for what comes after
			}
		}
	}()
	return keys
}

// show prints each decision of every proxy as it is made and does what keys ask
// for, until ctx ends or q is pressed. With guided it begins with the tour.
func (d *demo) show(ctx context.Context, guided bool) error {
	ctx, end := context.WithCancel(ctx)
	defer end()
	restore, ours, err := singleKeys(os.Stdin)
	if err != nil {
		return err
	}
	defer restore()
	s := &stage{d: d, p: &decisionPrinter{d: d, seen: map[string]time.Time{}}}
	if ours {
		s.keys = readKeys(os.Stdin)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer end()
	for _, name := range d.proxies() {
		tail, err := audit.OpenTail(d.auditFile(name), 0)
		if err != nil {
			return err
		}
		wg.Go(func() {
			defer tail.Close()
			for {
				line, _, err := tail.Next(ctx)
				if err != nil {
					return
				}
				s.p.print(line)
			}
		})
	}
	wg.Go(func() { s.p.watchPolicy(ctx) })
	if guided {
		if err := s.guide(ctx); err != nil || ctx.Err() != nil {
			return err
		}
	}
	s.p.line("decisions as they are made (the same within a second once); ? shows the keys, q or Ctrl-C ends")
	return s.obey(ctx)
}

// obey does what keys ask for.
func (s *stage) obey(ctx context.Context) error {
	for {
		key, ok := s.next(ctx)
		if !ok { // nobody types here, or not any more
			<-ctx.Done()
			return nil
		}
		switch key {
		case 'q':
			return nil
		case 't':
			if err := s.guide(ctx); err != nil {
				return err
			}
		case 'w':
			link, err := s.d.pageLink(ctx)
			if err != nil {
				return err
			}
			s.p.line("page  " + link)
		case '?', 'h':
			s.help()
		default:
			for _, x := range deeds() {
				if x.key == key {
					s.p.line(x.name + ": " + x.happens + "\n  " + x.look)
					_ = s.act(ctx, x) // told
				}
			}
		}
	}
}

// next is the next key; false when there is none any more.
func (s *stage) next(ctx context.Context) (byte, bool) {
	select {
	case <-ctx.Done():
		return 0, false
	case key, ok := <-s.keys:
		return key, ok
	}
}

func (s *stage) help() {
	var b strings.Builder
	b.WriteString("keys:")
	for _, x := range deeds() {
		fmt.Fprintf(&b, "\n    %c  %s", x.key, x.name)
	}
	b.WriteString("\n    t  the guided tour through all of these\n    w  a new link to the page\n    q  end")
	s.p.line(b.String())
}

// act does a deed, and tells what was seen.
func (s *stage) act(ctx context.Context, x deed) error {
	saw, err := x.do(s.d, ctx)
	switch {
	case ctx.Err() != nil:
	case err != nil:
		s.p.line("NOT SEEN, " + x.name + ": " + err.Error())
	default:
		s.p.line("seen, " + x.name + ": " + saw)
	}
	return err
}

// guide does one deed after another, each when a key is pressed.
func (s *stage) guide(ctx context.Context) error {
	s.p.muted.Store(true)
	defer s.p.muted.Store(false)
	all := deeds()
	s.p.line(fmt.Sprintf("a tour of %d steps. Open the page beside it. Space or Enter goes on, s leaves a step out, q ends the tour.", len(all)))
	broken := 0
	for i, x := range all {
		s.p.line(fmt.Sprintf("\n  step %d of %d, %s\n  %s\n  %s\n  press a key", i+1, len(all), x.name, x.happens, x.look))
		key, ok := s.next(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case !ok:
			return errors.New("the tour waits for keys, and its input has ended")
		case key == 'q':
			return nil
		case key == 's':
			continue
		}
		if s.act(ctx, x) != nil {
			broken++
		}
	}
	s.p.line(fmt.Sprintf("that was the tour: %d steps, %d not seen", len(all), broken))
	return nil
}
