package audit

import "golang.org/x/mod/sumdb/tlog"

// A spine is the whole subtrees that a tree falls into, the largest first: the
// least that must be known to go on with it and to say its root.
type spine struct {
	size  uint64
	nodes []node
}

// A node is the root of a subtree of so many leaves, a power of two.
type node struct {
	width uint64
	hash  tlog.Hash
}

func (s *spine) add(leaf tlog.Hash) { s.push(node{1, leaf}) }

// push adds a subtree, which is no larger than the one before.
func (s *spine) push(n node) {
	s.size += n.width
	for i := len(s.nodes) - 1; i >= 0 && s.nodes[i].width == n.width; i-- {
		n = node{2 * n.width, tlog.NodeHash(s.nodes[i].hash, n.hash)}
		s.nodes = s.nodes[:i]
	}
	s.nodes = append(s.nodes, n)
}

func (s *spine) root() tlog.Hash {
	i := len(s.nodes) - 1
	if i < 0 {
		h, _ := tlog.TreeHash(0, nil) // of the empty tree it is known
		return h
	}
	h := s.nodes[i].hash
	for i--; i >= 0; i-- {
		h = tlog.NodeHash(s.nodes[i].hash, h)
	}
	return h
}

// spine is the same tree with less.
func (e *edge) spine() (s spine) {
	for level := len(e.levels) - 1; level >= 0; level-- {
		each := uint64(1) << (level * tileHeight)
		for _, h := range e.levels[level] {
			s.push(node{each, h})
		}
	}
	return s
}
